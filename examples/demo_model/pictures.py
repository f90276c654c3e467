"""Draws the pictures that the demo model learns from: coloured shapes on varied backgrounds.

A scene is decided first (`draw_scene` returns what is in it), then painted; the same seed gives
the same pixels. This file knows nothing of questions or of the model.
"""

from __future__ import annotations

import colorsys
import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")

# name: (hue range in degrees, saturation range, value range)
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-10, 8), (0.72, 1.0), (0.62, 1.0)),
    "orange": ((21, 39), (0.82, 1.0), (0.88, 1.0)),
    "yellow": ((49, 62), (0.72, 1.0), (0.88, 1.0)),
    "green": ((95, 150), (0.5, 1.0), (0.4, 1.0)),
    "blue": ((204, 246), (0.6, 1.0), (0.5, 1.0)),
    "purple": ((268, 304), (0.45, 1.0), (0.4, 0.92)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.13)),
    "white": ((0, 360), (0.0, 0.04), (0.95, 1.0)),
}


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape of a scene; x, y and radius in fractions of the picture's shorter side."""

    shape: str
    colour: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float
    angle: float
    outline: tuple[int, int, int] | None


def sample_colour(rng: random.Random, name: str) -> tuple[int, int, int]:
    hue, saturation, value = (rng.uniform(*r) for r in COLOURS[name])
    r, g, b = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def draw_scene(rng: random.Random, hardness: float) -> tuple[Image.Image, list[Thing]]:
    """One picture and what is in it; `hardness` 0 gives small square pictures (a single tile)."""
    width, height = _sample_size(rng, hardness)
    background = _sample_background(rng)
    short = min(width, height)
    things = _place(rng, width / short, height / short, background)
    image = _paint(rng, width, height, background, things)
    return _degrade(rng, image), things


def _sample_size(rng: random.Random, hardness: float) -> tuple[int, int]:
    if rng.random() >= hardness:
        side = rng.uniform(72, 128)
        stretch = rng.uniform(0.85, 1.18)
        return round(side), round(side * stretch)
    area_side = math.exp(rng.uniform(math.log(100), math.log(560)))
    ratio = rng.choice((1, 1, 1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16, 2, 0.5, 3)) * rng.uniform(0.94, 1.06)
    return max(48, round(area_side * ratio**0.5)), max(48, round(area_side / ratio**0.5))


def _sample_background(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two ends of a gradient, often the same colour."""
    kind = rng.random()
    if kind < 0.4:  # light
        base = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.2), rng.uniform(0.8, 1))
    elif kind < 0.6:  # dark or grey
        base = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.4), rng.uniform(0, 0.55))
    else:
        base = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.75), rng.uniform(0.4, 1))
    first = tuple(round(c * 255) for c in base)
    if rng.random() < 0.6:
        return first, first  # type: ignore[return-value]
    second = tuple(min(255, max(0, c + rng.randint(-45, 45))) for c in first)
    return first, second  # type: ignore[return-value]


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return math.dist(a, b)


def _place(rng: random.Random, width: float, height: float, background: tuple[tuple[int, int, int], ...]) -> list[Thing]:
    number = rng.choices(range(7), weights=(2, 9, 6, 6, 6, 6, 1))[0]
    usable = [(s, c) for s in SHAPES for c in COLOURS]
    few_kinds = rng.random() < 0.55  # repeats make counting a real question
    kinds = rng.sample(usable, rng.randint(1, 2)) if few_kinds else usable
    low, high = (0.15, 0.46) if number == 1 else (0.10, 0.27) if number <= 3 else (0.085, 0.19)
    if number == 6:
        number = rng.randint(1, 5)
    things: list[Thing] = []
    for _ in range(number):
        for _attempt in range(60):
            shape, colour = rng.choice(kinds)
            rgb = sample_colour(rng, colour)
            if min(_distance(rgb, end) for end in background) < 85:
                kinds = kinds if _attempt < 15 else usable
                continue
            radius = rng.uniform(low, high)
            x, y = rng.uniform(radius * 1.03, width - radius * 1.03), rng.uniform(radius * 1.03, height - radius * 1.03)
            if any(math.dist((x, y), (t.x, t.y)) < (radius + t.radius) * 1.03 for t in things):
                continue
            outline = None
            if rng.random() < 0.25:
                shade = rng.choice((0.3, 0.5, 0.0))
                outline = tuple(round(c * shade) for c in rgb)
            angle = rng.uniform(-14, 14) if rng.random() < 0.5 else 0.0
            if shape in ("star", "triangle") and rng.random() < 0.25:
                angle = rng.uniform(0, 360)
            things.append(Thing(shape, colour, rgb, x, y, radius, angle, outline))  # type: ignore[arg-type]
            break
    return things


def _polygon(shape: str, rng: random.Random) -> list[tuple[float, float]]:
    """Corners around (0, 0) within the unit circle, y downwards."""
    if shape == "square":
        a = 0.74
        return [(-a, -a), (a, -a), (a, a), (-a, a)]
    if shape == "triangle":
        top, half = -0.92, rng.uniform(0.75, 0.95)
        low = math.sqrt(1 - half * half) if half < 0.92 else 0.55
        return [(rng.uniform(-0.12, 0.12), top), (half, max(low, 0.5)), (-half, max(low, 0.5))]
    if shape == "star":
        inner = rng.uniform(0.36, 0.48)
        return [
            (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
            for i in range(10)
            for r in ((1.0 if i % 2 == 0 else inner),)
        ]
    if shape == "cross":
        t = rng.uniform(0.22, 0.36)
        a = 0.93
        return [(-t, -a), (t, -a), (t, -t), (a, -t), (a, t), (t, t), (t, a), (-t, a), (-t, t), (-a, t), (-a, -t), (-t, -t)]
    points = []  # heart, a well-known parametric curve
    for i in range(48):
        u = 2 * math.pi * i / 48
        x = 16 * math.sin(u) ** 3
        y = 13 * math.cos(u) - 5 * math.cos(2 * u) - 2 * math.cos(3 * u) - math.cos(4 * u)
        points.append((x / 17, -(y + 2) / 17))
    return points


def _paint(
    rng: random.Random,
    width: int,
    height: int,
    background: tuple[tuple[int, int, int], tuple[int, int, int]],
    things: list[Thing],
) -> Image.Image:
    scale = 2 if max(width, height) < 320 else 1
    w, h = width * scale, height * scale
    first, second = (np.array(c, dtype=np.float32) for c in background)
    if (first == second).all():
        image = Image.new("RGB", (w, h), background[0])
    else:
        ramp = np.linspace(0, 1, w if rng.random() < 0.5 else h, dtype=np.float32)
        mix = ramp[None, :, None] if len(ramp) == w and rng.random() < 0.9 else None
        if mix is None:
            mix = np.linspace(0, 1, h, dtype=np.float32)[:, None, None]
        plane = np.broadcast_to(first * (1 - mix) + second * mix, (h, w, 3))
        image = Image.fromarray(plane.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.1:  # thin lines of a shade near the background's
        shade = tuple(min(255, max(0, c + rng.choice((-18, 18)))) for c in background[0])
        step = rng.randint(10, 40) * scale
        for offset in range(0, max(w, h), step):
            draw.line((offset, 0, offset, h), fill=shade, width=scale)
    short = min(w, h)
    for thing in things:
        x, y, radius = thing.x * short, thing.y * short, thing.radius * short
        line = max(1, round(radius * 0.09)) if thing.outline else 0
        if thing.shape == "circle":
            r = radius * 0.9
            draw.ellipse((x - r, y - r, x + r, y + r), fill=thing.rgb, outline=thing.outline, width=line)
            continue
        turn = math.radians(thing.angle)
        cos, sin = math.cos(turn), math.sin(turn)
        corners = [(x + radius * (a * cos - b * sin), y + radius * (a * sin + b * cos)) for a, b in _polygon(thing.shape, rng)]
        draw.polygon(corners, fill=thing.rgb)
        if thing.outline:
            draw.line([*corners, corners[0]], fill=thing.outline, width=line, joint="curve")
    return image.reduce(scale) if scale > 1 else image


def _degrade(rng: random.Random, image: Image.Image) -> Image.Image:
    if rng.random() < 0.12:
        image = image.filter(ImageFilter.GaussianBlur(min(image.size) * rng.uniform(0.001, 0.006)))
    if rng.random() < 0.25:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 9), (image.height, image.width, 1))
        image = Image.fromarray((np.asarray(image, dtype=np.float32) + noise).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(38, 95))
        image = Image.open(buffer).convert("RGB")
    return image
