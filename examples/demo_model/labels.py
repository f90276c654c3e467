"""What is to be seen at each image token of a picture's tiles: dense labels that teach the encoder, for training only.

A tile has SIDE x SIDE tokens. The labels of a token, in the order of `CLASSES`, are numbers from 0 (nothing); the box of the
thing whose middle it holds is in shares of the tile, NaN where there is none.
"""

from __future__ import annotations

import numpy as np
from model import IMAGE
from pictures import Picture
from world import COLOURS, SHAPES

from vlserve.vision.tiling import Grid

SIDE = round(IMAGE.tokens_per_tile**0.5)
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIZES = (0.15, 0.21, 0.29, 0.41, 0.58)  # borders between classes of size, each 1.4 times the one before
CLASSES = {
    "colour": 1 + len(COLOURS),
    "shape": 1 + len(SHAPES),
    "middles": 4,  # how many things have their middle here
    "size": 2 + len(SIZES),
    "left character": 1 + len(CHARACTERS),
    "right character": 1 + len(CHARACTERS),
    "bar": 6,
    "height": 11,
}


def label(picture: Picture, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Classes int64 [N, SIDE * SIDE, 8] and boxes float32 [N, SIDE * SIDE, 4] of the picture's N tiles, the thumbnail last."""
    windows = [(c, r, grid.columns, grid.rows) for r in range(grid.rows) for c in range(grid.columns)]
    if grid.num_tiles > 1:
        windows.append((0, 0, 1, 1))
    classes = np.zeros((len(windows), SIDE, SIDE, len(CLASSES)), np.int64)
    boxes = np.full((len(windows), SIDE, SIDE, 4), np.nan, np.float32)
    for n, (column, row, columns, rows) in enumerate(windows):

        def inside(x: float, y: float, c: int = column, r: int = row, cs: int = columns, rs: int = rows) -> tuple[float, float]:
            return x * cs - c, y * rs - r  # from shares of the picture to shares of this tile

        _label_things(picture, classes[n], boxes[n], inside)
        for letter in picture.letters:
            x, y = inside(*letter.centre)
            if 0 <= x < 1 and 0 <= y < 1:
                half = int(x * SIDE * 2) % 2
                cell = classes[n, int(y * SIDE), int(x * SIDE)]
                cell[4 + half] = cell[4 + half] or 1 + CHARACTERS.index(letter.character)
        for i, bar in enumerate(picture.bars):
            (x0, y0), (x1, y1) = inside(*bar.box[:2]), inside(*bar.box[2:])
            at = _centres()
            xs = np.flatnonzero((at > x0) & (at < x1)) if (x1 - x0) * SIDE > 1 else np.array([int((x0 + x1) / 2 * SIDE)])
            ys = np.flatnonzero((at > y0) & (at < y1))
            xs = xs[(xs >= 0) & (xs < SIDE)]
            classes[n, ys[:, None], xs[None, :], 6:8] = 1 + i, bar.height
    return classes.reshape(len(windows), -1, len(CLASSES)), boxes.reshape(len(windows), -1, 4)


def token_of(picture: Picture, grid: Grid, x: float, y: float) -> int:
    """The image token, counted from the picture's first, that holds a point: of the thumbnail, but of a full tile for letters."""
    base = 0
    if picture.letters:
        column, row = min(grid.columns - 1, int(x * grid.columns)), min(grid.rows - 1, int(y * grid.rows))
        x, y = x * grid.columns - column, y * grid.rows - row
        base = (row * grid.columns + column) * SIDE * SIDE
    elif grid.num_tiles > 1:
        base = grid.columns * grid.rows * SIDE * SIDE
    return base + min(SIDE - 1, max(0, int(y * SIDE))) * SIDE + min(SIDE - 1, max(0, int(x * SIDE)))


def _centres() -> np.ndarray:
    return (np.arange(SIDE) + 0.5) / SIDE


def _label_things(picture: Picture, classes: np.ndarray, boxes: np.ndarray, inside) -> None:
    at = _centres()
    for thing in picture.things:
        (x0, y0), (x1, y1) = inside(*thing.box[:2]), inside(*thing.box[2:])
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        rx, ry = max(1e-6, (x1 - x0) / 2 * 0.85), max(1e-6, (y1 - y0) / 2 * 0.85)
        covered = ((at[None, :] - x) / rx) ** 2 + ((at[:, None] - y) / ry) ** 2 < 1
        kind = 1 + list(COLOURS).index(thing.colour), 1 + list(SHAPES).index(thing.shape)
        classes[covered, 0:2] = kind
        if 0 <= x < 1 and 0 <= y < 1:
            cell = classes[int(y * SIDE), int(x * SIDE)]
            cell[0:2] = kind
            cell[2] = min(3, cell[2] + 1)
            cell[3] = 1 + int(np.searchsorted(SIZES, thing.size))
            boxes[int(y * SIDE), int(x * SIDE)] = x0, y0, x1, y1
