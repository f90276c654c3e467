"""Draws held-out scenes: palettes, backgrounds, fills and outlines, and the JPEG that is sent."""

import io
import math
import random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw

from held_out.shapes import Points, Scene, Size

Floats = npt.NDArray[np.float64]
Tone = tuple[int, int, int]
PALETTE: dict[str, tuple[Tone, ...]] = {
    "red": ((255, 0, 0), (220, 20, 60), (205, 0, 0), (227, 26, 28), (235, 45, 45)),
    "orange": ((255, 140, 0), (255, 127, 14), (245, 130, 32), (255, 145, 20)),
    "yellow": ((255, 255, 0), (255, 225, 25), (255, 235, 59), (255, 240, 80), (250, 222, 40)),
    "green": ((0, 128, 0), (34, 139, 34), (50, 205, 50), (44, 160, 44), (60, 179, 75)),
    "blue": ((0, 0, 255), (65, 105, 225), (30, 80, 220), (30, 144, 255), (0, 71, 171)),
    "purple": ((128, 0, 128), (148, 0, 211), (115, 20, 170), (145, 30, 180), (120, 50, 160)),
    "pink": ((255, 105, 180), (255, 130, 190), (255, 160, 200), (250, 150, 180), (255, 170, 205)),
    "brown": ((139, 69, 19), (121, 74, 44), (140, 85, 45), (105, 62, 32), (130, 70, 30)),
    "black": ((0, 0, 0), (12, 12, 12), (22, 22, 22), (16, 16, 22)),
    "white": ((255, 255, 255), (250, 250, 250), (248, 248, 255), (245, 245, 245)),
}
BACKGROUNDS: tuple[Tone, ...] = (
    *((255, 255, 255), (245, 245, 240), (225, 225, 225), (190, 190, 190), (125, 125, 125), (70, 70, 74), (35, 35, 38), (8, 8, 8)),
    *((250, 240, 215), (214, 234, 248), (253, 222, 230), (216, 240, 216), (230, 222, 245), (196, 164, 132), (150, 180, 190)),
    *(
        (47, 60, 80),
        (60, 45, 40),
        (45, 70, 62),
        (120, 135, 115),
        (150, 120, 125),
        (120, 215, 215),
        (165, 205, 180),
        (105, 160, 175),
    ),
)
TO_YCC = np.array([(0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081)])  # lightness weighs as it does in JPEG
LEAST_CONTRAST = 72.0  # black and white are 255 apart
FILLS = ("plain", "bordered", "double", "dashed", "hollow", "hollow double")
FILL_WEIGHTS = (58, 8, 5, 7, 16, 6)
FINER = 4  # shapes are drawn so many times as large and averaged down, for smooth edges
LARGE = 700  # pixels across from which half of that is enough


def lightness(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """How far apart two colours are in lightness alone, which JPEG keeps best."""
    return float(abs(TO_YCC[0] @ (np.asarray(one, float) - np.asarray(other, float))))


def contrast(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    return float(np.linalg.norm(TO_YCC @ (np.asarray(one, float) - np.asarray(other, float))))


def any_tone(rng: random.Random) -> Tone:
    return rng.choice(BACKGROUNDS) if rng.random() < 0.6 else (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def plain_against(rng: random.Random, tones: list[Tone], least: float) -> Tone:
    """A plain colour that is far from all the tones."""
    for _ in range(100):
        ground = any_tone(rng)
        if all(contrast(ground, tone) >= least for tone in tones):
            return ground
    return max(BACKGROUNDS, key=lambda ground: min(contrast(ground, tone) for tone in tones))


def background(rng: random.Random, size: Size, tones: list[Tone]) -> Image.Image:
    """Plain, a gradient or lightly noisy, and far from all the tones everywhere."""
    first = np.array(plain_against(rng, tones, LEAST_CONTRAST), float)
    way = (rng.random() < 0.4) * rng.uniform(0.2, 0.9) * (np.array(any_tone(rng), float) - first)
    while way.any() and any(
        contrast(first + way * part, tone) < LEAST_CONTRAST for part in np.linspace(0, 1, 6) for tone in tones
    ):
        way = np.where(np.abs(way) < 4, 0, way / 2)
    if not way.any() and rng.random() < 0.6:
        return Image.new("RGB", size, tuple(int(c) for c in first))
    x, y = (np.linspace(-1, 1, side, dtype=np.float32) for side in size)
    y = y[:, None]
    turn = rng.uniform(0, 2 * math.pi)
    across = x * math.cos(turn) + y * math.sin(turn)
    ramp = np.hypot(x, y) / math.sqrt(2) if rng.random() < 0.3 else (across - across.min()) / np.ptp(across)
    pixels = first.astype(np.float32) + ramp[..., None] * way.astype(np.float32)
    if not way.any() or rng.random() < 0.3:
        chance, channels = np.random.default_rng(rng.getrandbits(64)), rng.choice([1, 3])
        pixels += rng.uniform(2, 7) * chance.standard_normal((*ramp.shape, channels), dtype=np.float32)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255, out=pixels).astype(np.uint8))


def shade(rng: random.Random, tone: Tone) -> Tone:
    """The same colour a little darker or lighter."""
    lighter = max(tone) < 60 or (max(tone) < 245 and rng.random() < 0.3)
    r, g, b = (round(c + 0.25 * (255 - c)) if lighter else round(0.76 * c) for c in tone)
    return r, g, b


def walked(points: Points, dash: float) -> list[Points]:
    """Every other stretch of the closed outline, each about `dash` long."""
    steps = np.abs(np.roll(points, -1) - points)
    whole = float(steps.sum())
    number = max(4, round(whole / dash / 2))
    along, closed = np.append(0, np.cumsum(steps)), np.append(points, points[0])
    stretches = []
    for i in range(number):
        at = np.linspace(i / number, (i + 0.55) / number, 12) * whole
        stretches.append(np.interp(at, along, closed.real) + 1j * np.interp(at, along, closed.imag))
    return stretches


class Stencil:
    """Masks of one outline, finer than the picture, that are pasted in a tone."""

    def __init__(self, points: Points) -> None:
        self.left, self.top = int(points.real.min()) - 1, int(points.imag.min()) - 1
        self.size = (int(points.real.max()) + 2 - self.left, int(points.imag.max()) + 2 - self.top)
        self.finer = FINER if max(self.size) < LARGE else FINER // 2
        self.points = self.finer * (points - complex(self.left, self.top))
        self.inside = self._empty()
        ImageDraw.Draw(self.inside).polygon([(c.real, c.imag) for c in self.points.tolist()], fill=255)

    def _empty(self) -> Image.Image:
        return Image.new("L", (self.size[0] * self.finer, self.size[1] * self.finer))

    def rim(self, thickness: float, dash: float | None = None) -> Image.Image:
        """The part of the inside within `thickness` of the outline; with `dash`, of every other stretch of it."""
        mask = self._empty()
        pen, reach = ImageDraw.Draw(mask), thickness * self.finer
        for stretch in walked(self.points, dash * self.finer) if dash else [np.append(self.points, self.points[0])]:
            corners = [(corner.real, corner.imag) for corner in stretch.tolist()]
            pen.line(corners, fill=255, width=round(2 * reach))
            for x, y in [] if dash else corners:
                pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=255)
        return ImageChops.multiply(mask, self.inside)

    def paste(self, picture: Image.Image, mask: Image.Image, tone: Tone) -> None:
        picture.paste(tone, (self.left, self.top), mask.resize(self.size, Image.Resampling.BOX))


def fill(rng: random.Random, picture: Image.Image, points: Points, tone: Tone, how: str) -> None:
    stencil, across = Stencil(points), float(max(np.ptp(points.real), np.ptp(points.imag)))
    thick = max(2.5, across * rng.uniform(0.1, 0.15))
    thin = max(1.2, across * rng.uniform(0.025, 0.05))
    if how == "hollow":
        stencil.paste(picture, stencil.rim(thick), tone)
        return
    if how == "hollow double":
        gap = ImageChops.subtract(stencil.rim(0.72 * thick), stencil.rim(0.5 * thick))
        stencil.paste(picture, ImageChops.subtract(stencil.rim(thick * 1.2), gap), tone)
        return
    stencil.paste(picture, stencil.inside, tone)
    if how == "bordered":
        stencil.paste(picture, stencil.rim(thin), shade(rng, tone))
    elif how == "double":
        line = ImageChops.subtract(stencil.rim(3 * thin), stencil.rim(2 * thin))
        stencil.paste(picture, ImageChops.add(stencil.rim(thin), line), shade(rng, tone))
    elif how == "dashed":
        inset = ImageChops.subtract(stencil.rim(2.4 * thin, dash=across * 0.12), stencil.rim(thin))
        stencil.paste(picture, inset, shade(rng, tone))


def encode(rng: random.Random, picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=rng.randint(40, 95))
    return out.getvalue()


def draw(rng: random.Random, scene: Scene) -> bytes:
    tones = [rng.choice(PALETTE[placed.thing.colour]) for placed in scene.placed]
    picture = background(rng, scene.size, tones)
    common = rng.choices(FILLS, FILL_WEIGHTS)[0] if rng.random() < 0.6 else None
    for placed, tone in zip(scene.placed, tones, strict=True):
        fill(rng, picture, placed.points, tone, common or rng.choices(FILLS, FILL_WEIGHTS)[0])
    return encode(rng, picture)
