"""What every drawing needs: sizes, colours that go by one name, backgrounds, fonts, and what happens to pictures on their way."""

from __future__ import annotations

import colorsys
import io
import math
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

RGB = tuple[int, int, int]
FONT_PACKAGES = ("roboto", "source_sans_pro", "hanken_grotesk", "manrope", "caladea", "source_serif_pro")
# hue in degrees, saturation and value in per cent; the ranges leave out what could go by two names
HSV = {
    "red": ((350, 367), (75, 100), (70, 100)),
    "green": ((95, 150), (50, 100), (45, 90)),
    "blue": ((208, 243), (65, 100), (60, 100)),
    "yellow": ((50, 60), (70, 100), (92, 100)),
    "black": ((0, 360), (0, 30), (0, 11)),
    "white": ((0, 360), (0, 4), (95, 100)),
    "orange": ((22, 37), (82, 100), (92, 100)),
    "purple": ((268, 296), (50, 100), (42, 80)),
    "pink": ((320, 350), (24, 60), (95, 100)),
    "brown": ((16, 32), (55, 90), (30, 56)),
}
LEAST_DISTANCE = 85.0  # between a shape's colour and the background, in RGB
SCALE = 2  # drawn larger, then shrunk: smooth edges


def choose_size(rng: random.Random, small: bool) -> tuple[int, int]:
    """Width and height; `small` has one tile."""
    short = rng.randint(130, 380)
    kind = 0.0 if small else rng.random()
    if kind < 0.72:
        ratio = rng.uniform(0.77, 1.45)
    elif kind < 0.95:
        ratio = rng.choice((rng.uniform(1.5, 2.4), rng.uniform(0.45, 0.75)))
    else:
        ratio = rng.choice((rng.uniform(2.5, 3.2), rng.uniform(0.31, 0.4)))
    return (round(short * ratio), short) if ratio >= 1 else (short, round(short / ratio))


def few(rng: random.Random, names: list[str]) -> list[str]:
    """All names, or now and then a few of them, so that things share a colour or a shape and there is something to count."""
    kind = rng.random()
    return names if kind < 0.5 or len(names) < 3 else rng.sample(names, rng.randint(1 if kind > 0.85 else 2, 3))


def shade(rng: random.Random, colour: str, background: RGB) -> RGB:
    for _ in range(8):
        hue, saturation, value = (rng.uniform(*span) for span in HSV[colour])
        r, g, b = (round(255 * v) for v in colorsys.hsv_to_rgb(hue % 360 / 360, saturation / 100, value / 100))
        if math.dist((r, g, b), background) > LEAST_DISTANCE:
            break
    return r, g, b


def is_clear(colour: str, background: RGB, least: float = LEAST_DISTANCE + 25) -> bool:
    middle = [sum(span) / 2 for span in HSV[colour]]
    rgb = [255 * v for v in colorsys.hsv_to_rgb(middle[0] % 360 / 360, middle[1] / 100, middle[2] / 100)]
    return math.dist(rgb, background) > least


def background_colour(rng: random.Random, light: float = 0.65) -> RGB:
    hue, kind = rng.random(), rng.random()
    if kind < light * 0.5:
        return (255, 255, 255) if rng.random() < 0.6 else (rng.randint(225, 255),) * 3
    if kind < light:
        saturation, value = rng.uniform(0.02, 0.28), rng.uniform(0.82, 1.0)
    elif kind < light + (1 - light) * 0.5:
        saturation, value = rng.uniform(0, 0.6), rng.uniform(0.02, 0.3)
    else:
        saturation, value = rng.uniform(0, 0.45), rng.uniform(0.35, 0.8)
    r, g, b = (round(255 * v) for v in colorsys.hsv_to_rgb(hue, saturation, value))
    return r, g, b


def opposite(background: RGB) -> RGB:
    return (0, 0, 0) if sum(background) > 380 else (255, 255, 255)


def new_canvas(rng: random.Random, width: int, height: int, background: RGB) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    if rng.random() < 0.2:  # a gradient
        end = [min(255, max(0, c + rng.randint(-40, 40))) for c in background]
        mix = np.linspace(0, 1, 16)[:, None, None] * (np.array(end) - background) + background
        strip = Image.fromarray(np.broadcast_to(mix, (16, 2, 3)).astype(np.uint8))
        strip = strip if rng.random() < 0.5 else strip.transpose(Image.Transpose.ROTATE_90)
        image = strip.resize((width * SCALE, height * SCALE), Image.Resampling.BILINEAR)
    else:
        image = Image.new("RGB", (width * SCALE, height * SCALE), background)
    return image, ImageDraw.Draw(image)


def finish(rng: random.Random, image: Image.Image, background: RGB = (0, 0, 0), angle: float = 0.0) -> Image.Image:
    """To its size, turned if asked, then what happens to pictures on their way: blur, noise, JPEG."""
    image = image.reduce(SCALE).rotate(angle, resample=Image.Resampling.BILINEAR, fillcolor=background)
    if rng.random() < 0.05:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    if rng.random() < 0.15:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 9), (image.height, image.width, 1))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(35, 95))
        image = Image.open(buffer).convert("RGB")
    return image


@lru_cache(maxsize=1)
def _font_files() -> list[Path]:
    """Of the font packages on PyPI that `pip install font-roboto` and the like bring."""
    import importlib.util

    files: list[Path] = []
    for package in FONT_PACKAGES:
        spec = importlib.util.find_spec(f"font_{package}") or importlib.util.find_spec(f"font_{package.replace('_', '')}")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("the fonts are missing: pip install -r examples/demo_model/fonts.txt")
        found = sorted(p for p in Path(spec.submodule_search_locations[0]).rglob("*.[ot]tf"))
        files += [p for p in found if not any(word in p.name for word in ("Thin", "ExtraLight", "Variable"))]
    return files


@lru_cache(maxsize=256)
def choose_font(seed: int, size: int) -> ImageFont.FreeTypeFont:
    files = _font_files()
    return ImageFont.truetype(str(files[seed % len(files)]), size)


def font_like(font: ImageFont.FreeTypeFont, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.path, size)
