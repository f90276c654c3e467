"""One training sample while it is put together: tokens, what is to be learnt of them, and where in the pictures to look."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from asker import NOWHERE, Piece, Points, Turn
from labels import token_of
from model import IMAGE
from pictures import Picture
from tokenizers import Tokenizer
from world import LANGUAGES

from vlserve.vision.preprocess import make_tiles
from vlserve.vision.tiling import Grid

LENGTH = 300  # tokens that a row is filled up to
LIMIT = 312  # that it does not exceed, unless its first turn does
TASKS = (
    *("shape", "colour", "count", "where", "size", "yes_no", "number", "word"),
    *("chart_best", "chart_height", "describe", "compare", "follow_up", "json", "box", "about"),
)


@dataclass(slots=True)
class Row:
    """One sample while it is put together."""

    tokenizer: Tokenizer
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # -100 where nothing is learnt
    positions: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)  # 0 for the shared beginning, k for the k-th part
    turns: list[int] = field(default_factory=list)  # which turn a learnt token belongs to; -1 for none
    kinds: list[int] = field(default_factory=list)  # of each turn: its task * 2 + its language
    looks: list[tuple[int, int, int, float]] = field(default_factory=list)  # (0 via, 1 seen), position, where to look, weight
    starts: list[int] = field(default_factory=list)  # position of each picture's first image token
    pictures: list[tuple[Picture, Grid]] = field(default_factory=list)
    pixels: list[torch.Tensor] = field(default_factory=list)

    def add(self, text: str, part: int) -> None:
        self._extend(self.tokenizer.encode(text, add_special_tokens=False).ids, part)

    def add_picture(self, picture: Picture, part: int) -> None:
        tiles = make_tiles(picture.image, IMAGE)
        context = self.tokenizer.token_to_id("<IMG_CONTEXT>")
        self._extend([self.tokenizer.token_to_id("<img>")], part)
        self.starts.append(len(self.ids))
        self._extend([context] * tiles.num_tokens + [self.tokenizer.token_to_id("</img>")], part)
        self.add("\n", part)
        self.pictures.append((picture, tiles.grid))
        self.pixels.append(tiles.pixels)

    def add_answer(self, turn: Turn, part: int) -> None:
        encoding = self.tokenizer.encode(turn.text, add_special_tokens=False)
        begin = len(self.ids)
        ids = [*encoding.ids, self.tokenizer.token_to_id("<|im_end|>")]
        self._extend(ids, part)
        self.labels[begin:] = ids
        self.turns[begin:] = [len(self.kinds)] * len(ids)
        self.kinds.append(TASKS.index(turn.task) * 2 + LANGUAGES.index(turn.language))
        at = 0
        for piece in turn.answer:
            end = at + len(piece.text)
            if piece.seen:
                for i, (low, high) in enumerate(encoding.offsets):
                    if low < end and high > at:
                        self._look(begin + i - 1, piece)
            at = end
        self.add("\n", part)

    def lengths(self) -> list[tuple[list, int]]:
        """What `cut` takes back to."""
        lists = (self.kinds, self.ids, self.labels, self.positions, self.parts, self.turns, self.looks, self.starts)
        return [(values, len(values)) for values in (*lists, self.pictures, self.pixels)]

    def cut(self, lengths: list[tuple[list, int]]) -> bool:
        """Drop what came since if the row is too long now; whether it is full."""
        if len(self.ids) > LIMIT and lengths[0][1]:  # a turn stays
            for values, length in lengths:
                del values[length:]
            return True
        return len(self.ids) >= LENGTH

    def _look(self, position: int, piece: Piece) -> None:
        for kind, points in ((0, piece.via or piece.seen), (1, piece.seen)):
            places = self._places(points)
            self.looks += [(kind, position, place, 1 / len(places)) for place in places]

    def _places(self, points: Points) -> list[int]:
        out = []
        for number, x, y in points:
            picture, grid = self.pictures[number]
            last = grid.num_tiles * IMAGE.tokens_per_tile
            out.append(self.starts[number] + (last if x == NOWHERE else token_of(picture, grid, x, y)))
        return out

    def _extend(self, ids: list[int], part: int) -> None:
        after = 1 + next((p for p, q in zip(reversed(self.positions), reversed(self.parts), strict=True) if q in (0, part)), -1)
        self.ids += ids
        self.labels += [-100] * len(ids)
        self.turns += [-1] * len(ids)
        self.parts += [part] * len(ids)
        self.positions += range(after, after + len(ids))
