"""Draws held-out bar charts: integer heights on an axis from 0 to 10, bars labelled A, B, C... from left to right."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from held_out.drawing import PALETTE, Tone, contrast, encode, shade
from held_out.lettering import font
from held_out.shapes import Size

LABELS = "ABCDE"
HIGHEST = 10
LEAST_SIDE, LARGEST_SIDE = 200, 1000
LEAST_CONTRAST = 60.0
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol", "cmss10", "cmr10")
PAPERS: tuple[tuple[Tone, Tone], ...] = (  # and the ink on each
    *(
        ((255, 255, 255), (0, 0, 0)),
        ((255, 255, 255), (60, 60, 60)),
        ((248, 248, 240), (40, 40, 60)),
        ((234, 234, 242), (30, 30, 30)),
    ),
    *(
        ((255, 247, 224), (70, 50, 30)),
        ((230, 240, 230), (20, 50, 30)),
        ((30, 30, 36), (235, 235, 235)),
        ((20, 35, 60), (220, 230, 255)),
    ),
)


@dataclass(frozen=True)
class Plot:
    """Where the values lie: the pixels of 0 and of 10, and those of the axes' ends."""

    left: float
    right: float
    floor: float
    ceiling: float

    def level(self, value: float) -> float:
        return self.floor - (self.floor - self.ceiling) * value / HIGHEST


def chart_size(rng: random.Random) -> Size:
    ratio = rng.choices([rng.uniform(1, 4 / 3), rng.uniform(0.75, 1), rng.uniform(4 / 3, 1.9)], [60, 15, 25])[0]
    short = rng.uniform(LEAST_SIDE**0.5, (LARGEST_SIDE / max(ratio, 1 / ratio)) ** 0.5) ** 2  # small ones more often
    return (round(short * ratio), round(short)) if ratio >= 1 else (round(short), round(short / ratio))


def dashes(pen: ImageDraw.ImageDraw, start: float, end: float, y: float, pattern: tuple[int, int], ink: Tone, width: int) -> None:
    on, off = pattern
    x = start
    while x < end:
        pen.line([(x, y), (min(x + on, end), y)], fill=ink, width=width)
        x += on + off


def draw_axes(
    rng: random.Random, pen: ImageDraw.ImageDraw, plot: Plot, letters: ImageFont.FreeTypeFont, paper: Tone, ink: Tone
) -> None:
    """Gridlines or not, the axis from 0 to 10 with its numbers, and a base line."""
    every, line = rng.choice([1, 2, 2, 2]), max(1, round(letters.size * rng.uniform(0.06, 0.14)))
    if letters.size * 1.05 * HIGHEST / every > plot.floor - plot.ceiling:
        every = 2
    grid = rng.choice([None, None, (1, 0), (6, 4), (2, 3), (10, 5)])
    r, g, b = ((3 * p + i) // 4 for p, i in zip(paper, ink, strict=True))
    tick = rng.choice([0.0, 0.25, 0.4]) * letters.size
    for value in range(0, HIGHEST + 1, every):
        y = plot.level(value)
        if grid is not None and value:
            stretch = (round(plot.right - plot.left), 0) if grid == (1, 0) else (grid[0] * line, grid[1] * line)
            dashes(pen, plot.left, plot.right, y, stretch, (r, g, b), line)
        pen.line([(plot.left - tick, y), (plot.left, y)], fill=ink, width=line)
        pen.text((plot.left - tick - 0.3 * letters.size, y), str(value), fill=ink, font=letters, anchor="rm")
    pen.line([(plot.left, plot.floor), (plot.right, plot.floor)], fill=ink, width=line)
    pen.line([(plot.left, plot.floor), (plot.left, plot.ceiling)], fill=ink, width=line)
    if rng.random() < 0.3:  # a frame all around
        pen.line([(plot.left, plot.ceiling), (plot.right, plot.ceiling), (plot.right, plot.floor)], fill=ink, width=line)


def bar_tones(rng: random.Random, number: int, paper: Tone) -> list[Tone]:
    """All alike, or each another colour."""
    seen = [tone for tones in PALETTE.values() for tone in tones if contrast(tone, paper) >= LEAST_CONTRAST]
    return [rng.choice(seen)] * number if rng.random() < 0.5 else [rng.choice(seen) for _ in range(number)]


def draw_chart(rng: random.Random, heights: Sequence[int]) -> bytes:
    size, (paper, ink) = chart_size(rng), rng.choice(PAPERS)
    letters = font(rng.choice(FONTS), max(12, round(min(size) * rng.uniform(0.055, 0.075))))
    picture = Image.new("RGB", size, paper)
    pen = ImageDraw.Draw(picture)
    plot = Plot(
        left=letters.size * rng.uniform(2.0, 2.8),
        right=size[0] - letters.size * rng.uniform(0.5, 1.5),
        floor=size[1] - letters.size * rng.uniform(1.6, 2.2),
        ceiling=letters.size * rng.uniform(0.8, 1.6),
    )
    draw_axes(rng, pen, plot, letters, paper, ink)
    slot, share = (plot.right - plot.left) / len(heights), rng.uniform(0.4, 0.85)
    edge = rng.choice([0, 0, max(1, round(letters.size * 0.1))])
    for i, (height, tone) in enumerate(zip(heights, bar_tones(rng, len(heights), paper), strict=True)):
        middle = plot.left + (i + 0.5) * slot
        box = (middle - share * slot / 2, plot.level(height), middle + share * slot / 2, plot.floor)
        pen.rectangle(box, fill=tone, outline=shade(rng, tone) if edge else None, width=edge)
        pen.text((middle, plot.floor + 0.35 * letters.size), LABELS[i], fill=ink, font=letters, anchor="mt")
    pen.line([(plot.left, plot.floor), (plot.right, plot.floor)], fill=ink, width=1)
    return encode(rng, picture)
