"""Draws the pictures that the demo model learns from: shapes, written words and numbers, bar charts. Seeded, and labelled.

Coordinates in `Thing`, `Letter` and `Bar` are fractions of the picture's width and height.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from canvas import (
    RGB,
    SCALE,
    background_colour,
    choose_font,
    choose_size,
    few,
    finish,
    font_like,
    is_clear,
    new_canvas,
    opposite,
    shade,
)
from PIL import Image, ImageDraw
from world import COLOURS, SHAPES, WORDS

Kind = tuple[str | None, str | None]  # shape and colour; None for any
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Thing:
    shape: str
    colour: str
    box: Box
    size: float  # the larger side of its box, as a share of the picture's shorter side

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, slots=True)
class Letter:
    character: str
    centre: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Bar:
    height: int
    box: Box  # from the top of the axis to below its label, so that a token of it sees all


@dataclass(frozen=True, slots=True)
class Picture:
    image: Image.Image
    things: tuple[Thing, ...] = ()
    letters: tuple[Letter, ...] = ()
    bars: tuple[Bar, ...] = ()

    @property
    def text(self) -> str:
        return "".join(letter.character for letter in self.letters)


def draw_scene(rng: random.Random, *, small: bool = False, lone: Kind | None = None) -> Picture:
    """One to nine shapes; `small` pictures have few shapes and one tile; `lone` asks for one shape, perhaps of a certain kind."""
    width, height = choose_size(rng, small)
    short = min(width, height)
    number = (
        1
        if lone
        else rng.choice((1, 2, 2, 3, 3, 4, 4, 5))
        if small or rng.random() < 0.5
        else rng.choice((4, 5, 6, 7, 7, 8, 8, 9, 9))
    )
    background = background_colour(rng)
    palette = few(rng, [c for c in COLOURS if is_clear(c, background)])
    shapes = few(rng, list(SHAPES))
    kinds = _kinds(rng, number, shapes, palette)
    image, draw = new_canvas(rng, width, height, background)
    things: list[Thing] = []
    circles: list[tuple[float, float, float]] = []
    largest = min(0.42, 0.62 / math.sqrt(number))
    for _ in range(number * 30):
        if len(things) == number:
            break
        radius = short * (0.085 + (largest - 0.085) * rng.random() ** 1.5)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if any(math.hypot(x - a, y - b) < radius + r + 0.03 * short for a, b, r in circles):
            continue
        shape, colour = kinds[len(things)]
        if lone:
            shape, colour = lone[0] or shape, lone[1] if lone[1] and is_clear(lone[1], background) else colour
        points = outline(rng, shape) * radius + complex(x, y)
        fill(rng, draw, points, shade(rng, colour, background), radius)
        xs, ys = points.real, points.imag
        box = (xs.min() / width, ys.min() / height, xs.max() / width, ys.max() / height)
        things.append(Thing(shape, colour, box, float(max(np.ptp(xs), np.ptp(ys))) / short))
        circles.append((x, y, radius))
    things.sort(key=lambda t: (int(t.centre[1] * 6), t.centre[0]))  # as one reads
    return Picture(finish(rng, image), tuple(things))


def _kinds(rng: random.Random, number: int, shapes: list[str], palette: list[str]) -> list[tuple[str, str]]:
    """Shapes with their colours; among more than three, mostly some number of one shape, of one colour, or of both."""
    kinds = [(rng.choice(shapes), rng.choice(palette)) for _ in range(number)]
    if number > 3 and rng.random() < 0.8:
        shape, colour = rng.choice(((kinds[0][0], None), (None, kinds[0][1]), kinds[0]))
        alike = rng.randint(2, number)
        kinds = [(shape or s, colour or c) if i < alike else (s, c) for i, (s, c) in enumerate(kinds)]
        rng.shuffle(kinds)
    return kinds


def draw_text(rng: random.Random, *, number: bool) -> Picture:
    """A number of up to four digits, or a word of three to eight letters, half to nearly all of the picture wide."""
    if number:
        text = str(rng.randrange(10 ** rng.randint(1, 4)))
    elif rng.random() < 0.6:
        text = rng.choice(WORDS)
    else:
        text = "".join(rng.choice("aeiouy" if i % 2 else "bcdfghjklmnpqrstvwxz") for i in range(rng.randint(3, 8)))
        text = text if rng.random() < 0.7 else "".join(rng.sample(text, len(text)))
    text = rng.choice((text, text.upper(), text.upper(), text.capitalize()))
    width, height = choose_size(rng, rng.random() < 0.7)
    font = choose_font(rng.randrange(10**6), 64)
    spacing = rng.choice((0.0, 0.0, rng.uniform(0, 0.25))) * 64
    starts = [font.getlength(text[:i]) + i * spacing for i in range(len(text) + 1)]
    _, top, _, bottom = font.getbbox(text, anchor="ls")
    zoom = min(rng.uniform(0.5, 0.92) * width / max(starts[-1], 1), 0.7 * height / (bottom - top))
    font = font_like(font, max(9, round(64 * zoom * SCALE)))
    zoom = font.size / SCALE / 64
    span, tall = starts[-1] * zoom, (bottom - top) * zoom
    x0 = rng.uniform(0.03 * width, max(0.03 * width, 0.97 * width - span))
    y0 = rng.uniform(0.05 * height, max(0.05 * height, 0.95 * height - tall)) - top * zoom
    background = background_colour(rng)
    ink = rng.choice([shade(rng, c, background) for c in COLOURS if is_clear(c, background, 170)] or [opposite(background)])
    image, draw = new_canvas(rng, width, height, background)
    for character, start in zip(text, starts, strict=False):
        draw.text(((x0 + start * zoom) * SCALE, y0 * SCALE), character, font=font, fill=ink, anchor="ls")
    if rng.random() < 0.15:
        draw.line([(v * SCALE) for v in (x0, y0 + 0.3 * tall, x0 + span, y0 + 0.3 * tall)], fill=ink, width=SCALE)
    angle = rng.choice((0.0, rng.uniform(-5, 5)))
    middle = y0 + (top + bottom) / 2 * zoom
    turn, centre = complex(math.cos(math.radians(angle)), -math.sin(math.radians(angle))), complex(width / 2, height / 2)
    letters = []
    for i, character in enumerate(text):
        at = (complex(x0 + (starts[i] + starts[i + 1]) / 2 * zoom, middle) - centre) * turn + centre
        letters.append(Letter(character.upper(), (at.real / width, at.imag / height)))
    return Picture(finish(rng, image, background, angle), letters=tuple(letters))


def draw_chart(rng: random.Random) -> Picture:
    """Two to five bars, A to E, one to ten high, on an axis from nought to ten."""
    width, height = choose_size(rng, rng.random() < 0.8)
    number = rng.randint(2, 5)
    heights = [rng.randint(1, 10) for _ in range(number)]
    background = background_colour(rng, light=0.85)
    ink = opposite(background)
    grey: RGB = tuple((3 * b + i) // 4 for b, i in zip(background, ink, strict=True))  # type: ignore[assignment]
    image, draw = new_canvas(rng, width, height, background)
    left, right = rng.uniform(0.1, 0.17) * width, rng.uniform(0.9, 0.98) * width
    top, bottom = rng.uniform(0.05, 0.14) * height, rng.uniform(0.8, 0.88) * height
    seed, step = rng.randrange(10**6), rng.choice((1, 2, 2, 5, 5, 10))
    small = choose_font(seed, max(10, round(min(0.06 * height, 0.07 * width) * SCALE)))
    large = choose_font(seed, max(12, round(min(0.1 * height, 0.09 * width) * SCALE)))
    grid, dashed = rng.random() < 0.5, rng.random() < 0.4
    for value in range(0, 11, step):
        y = bottom - (bottom - top) * value / 10
        if grid and value:
            gap = rng.uniform(3, 8) if dashed else right - left
            x = left
            while x < right:
                draw.line([v * SCALE for v in (x, y, min(right, x + gap), y)], fill=grey, width=SCALE)
                x += gap * 2 if dashed else gap
        draw.line([v * SCALE for v in (left - 0.015 * width, y, left, y)], fill=ink, width=SCALE)
        draw.text(((left - 0.02 * width) * SCALE, y * SCALE), str(value), font=small, fill=ink, anchor="rm")
    palette = [shade(rng, c, background) for c in COLOURS if is_clear(c, background)]
    one = rng.choice(palette)
    slot, share = (right - left) / number, rng.uniform(0.45, 0.85)
    bars = []
    for i, value in enumerate(heights):
        x0 = left + slot * (i + (1 - share) / 2)
        x1, y = x0 + slot * share, bottom - (bottom - top) * value / 10
        fill = one if seed % 2 else rng.choice(palette)
        draw.rectangle([v * SCALE for v in (x0, y, x1, bottom)], fill=fill, outline=ink if seed % 3 == 0 else None, width=SCALE)
        draw.text(((x0 + x1) / 2 * SCALE, (bottom + 0.02 * height) * SCALE), "ABCDE"[i], font=large, fill=ink, anchor="mt")
        bars.append(Bar(value, (x0 / width, top / height, x1 / width, min(1.0, bottom / height + 0.12))))
    draw.line([v * SCALE for v in (left, top, left, bottom, right, bottom)], fill=ink, width=SCALE * rng.choice((1, 2)))
    return Picture(finish(rng, image), bars=tuple(bars))


def outline(rng: random.Random, shape: str) -> np.ndarray:
    """A shape's corners as complex numbers within the unit circle, y downwards, turned by a little."""
    turns = np.arange(48) / 48 * 2 * np.pi
    if shape == "circle":
        points = np.exp(1j * turns)
    elif shape == "square":
        points = np.exp(1j * (np.arange(4) / 2 + 0.25) * np.pi)
    elif shape == "rectangle":
        low = 1 / rng.uniform(1.9, 2.8)
        points = np.array([-1 - low * 1j, 1 - low * 1j, 1 + low * 1j, -1 + low * 1j]) * (1j if rng.random() < 0.5 else 1)
        points = points / abs(points[0])
    elif shape == "triangle":
        side = rng.uniform(0.7, 0.95)
        points = np.array([-1j, side + 0.6j, -side + 0.6j])
    elif shape == "diamond":
        side = rng.uniform(0.62, 1.0)
        points = np.array([-1j, side, 1j, -side])
        points = points if rng.random() < 0.7 else points * 1j
    elif shape == "star":
        inner = rng.uniform(0.38, 0.52)
        points = np.exp(1j * (np.arange(10) / 5 - 0.5) * np.pi) * np.where(np.arange(10) % 2, inner, 1.0)
    elif shape == "cross":
        arm = rng.uniform(0.2, 0.36)
        quarter = np.array([arm - arm * 1j, arm - 1j, -arm - 1j, -arm - arm * 1j])
        points = np.concatenate([quarter * (-1j) ** k for k in range(4)])
        points = points / abs(points).max()
    else:  # heart
        x = 16 * np.sin(turns) ** 3
        y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        points = (x - 1j * y) / 17.5
    limit = 8 if shape in ("square", "diamond") else 20
    return points * np.exp(1j * math.radians(rng.choice((0.0, rng.uniform(-limit, limit), rng.uniform(-limit, limit)))))


def fill(rng: random.Random, draw: ImageDraw.ImageDraw, points: np.ndarray, colour: RGB, radius: float) -> None:
    corners = [(p.real * SCALE, p.imag * SCALE) for p in points]
    closed = [*corners, *corners[:2]]
    style = rng.random()
    if style < 0.1:  # the line alone
        draw.line(closed, fill=colour, width=max(3, round(radius * rng.uniform(0.18, 0.3) * SCALE)), joint="curve")
        return
    draw.polygon(corners, fill=colour)
    if style < 0.3:
        edge = rng.choice([(0, 0, 0), (255, 255, 255), tuple(v * 2 // 3 for v in colour)])
        draw.line(closed, fill=edge, width=max(SCALE, round(radius * rng.uniform(0.02, 0.07) * SCALE)), joint="curve")
