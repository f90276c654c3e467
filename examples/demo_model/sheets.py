"""Crowded pictures of one tile for the encoder's first lessons: many shapes, or lines of letters, so that nearly every token
has something to learn from. Pictures as people send them come after these.
"""

from __future__ import annotations

import math
import random

from canvas import SCALE, background_colour, choose_font, few, finish, is_clear, new_canvas, opposite, shade
from model import TILE
from pictures import Letter, Picture, Thing, fill, outline
from world import COLOURS, SHAPES, WORDS

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def draw_shapes(rng: random.Random) -> Picture:
    """As many shapes as find room, up to twenty."""
    background = background_colour(rng)
    palette = few(rng, [c for c in COLOURS if is_clear(c, background)])
    image, draw = new_canvas(rng, TILE, TILE, background)
    things: list[Thing] = []
    circles: list[tuple[float, float, float]] = []
    largest = rng.uniform(15, 40)
    for _ in range(60):
        radius = rng.uniform(9, largest)
        x, y = rng.uniform(radius, TILE - radius), rng.uniform(radius, TILE - radius)
        if len(things) == 20 or any(math.hypot(x - a, y - b) < (radius + r) * 0.92 for a, b, r in circles):
            continue
        shape, colour = rng.choice(list(SHAPES)), rng.choice(palette)
        points = outline(rng, shape) * radius + complex(x, y)
        fill(rng, draw, points, shade(rng, colour, background), radius)
        box = (points.real.min() / TILE, points.imag.min() / TILE, points.real.max() / TILE, points.imag.max() / TILE)
        things.append(Thing(shape, colour, box, max(box[2] - box[0], box[3] - box[1])))
        circles.append((x, y, radius))
    return Picture(finish(rng, image), tuple(things))


def draw_letters(rng: random.Random) -> Picture:
    """Lines of letters and digits in several fonts and sizes; every line at least a token high."""
    background = background_colour(rng)
    inks = [shade(rng, c, background) for c in COLOURS if is_clear(c, background, 150)] or [opposite(background)]
    image, draw = new_canvas(rng, TILE, TILE, background)
    letters, y = [], rng.uniform(-6, 8)
    while y < TILE - 12:
        size = rng.uniform(14, 46)
        font, ink = choose_font(rng.randrange(10**6), round(size) * SCALE), rng.choice(inks)
        text = rng.choice(WORDS) + rng.choice(WORDS) if rng.random() < 0.4 else "".join(rng.choices(CHARACTERS, k=12))
        text = rng.choice((text, text.upper(), text.upper()))
        middle, x, spacing = y + max(12.0, size * 0.45), rng.uniform(-4, 14), rng.choice((0.0, rng.uniform(0, 0.3)))
        for character in text:
            width = max(font.getlength(character) / SCALE, 12.0 if spacing else 0.0)
            if x + width > TILE:
                break
            draw.text(((x + width / 2) * SCALE, (middle + 0.36 * size) * SCALE), character, font=font, fill=ink, anchor="ms")
            if x > 0 and 0 < middle < TILE:
                letters.append(Letter(character.upper(), ((x + width / 2) / TILE, middle / TILE)))
            x += width * (1 + spacing)
        y = middle + max(12.0, size * 0.5)
    return Picture(finish(rng, image), letters=tuple(letters))
