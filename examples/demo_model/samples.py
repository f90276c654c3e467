"""Training samples: pictures' tiles, several questions in one row of tokens, what is to be learnt, and where to look for it.

Questions of one part see what comes before all parts and their own part, never another one, so that a picture is encoded
once for all of them. Shapes: B samples, T tokens, N tiles, K image tokens a tile.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import phrases
import torch
from asker import Asker, Turn
from labels import label
from model import IMAGE
from pictures import Picture, draw_chart, draw_scene, draw_text
from questions import about, ask, ask_again, ask_compare, ask_missing
from row import Row
from sheets import draw_letters, draw_shapes
from tokenizers import Tokenizer
from world import LANGUAGES

from vlserve.vision.preprocess import make_tiles
from vlserve.vision.tiling import Grid


class Samples(torch.utils.data.IterableDataset):
    """Samples from `start` on, in order; sample i is the same in every run. `crowded`: share of `sheets`, for the encoder."""

    def __init__(
        self, tokenizer: Tokenizer, seed: int, start: int, end: int, *, pictures_only: bool = False, crowded: float = 0.0
    ) -> None:
        self.tokenizer, self.seed, self.start, self.end = tokenizer, seed, start, end
        self.pictures_only, self.crowded = pictures_only, crowded

    def __iter__(self) -> Iterator[Row | tuple[Picture, Grid, torch.Tensor]]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(self.start + first, self.end, step):
            if self.pictures_only:
                picture = draw_lesson(random.Random(f"tiles-{self.seed}-{i}"), self.crowded)
                tiles = make_tiles(picture.image, IMAGE)
                yield picture, tiles.grid, tiles.pixels
            else:
                yield make_row(self.tokenizer, random.Random(f"row-{self.seed}-{i}"))


def draw_lesson(rng: random.Random, crowded: float) -> Picture:
    """For the encoder alone."""
    if rng.random() >= crowded:
        return draw(rng)
    kind = rng.random()
    return draw_shapes(rng) if kind < 0.42 else draw_letters(rng) if kind < 0.84 else draw_chart(rng)


def draw(rng: random.Random, *, small: bool = False) -> Picture:
    kind = rng.random()
    if kind < 0.6:
        return draw_scene(rng, small=small)
    if kind < 0.88:
        return draw_text(rng, number=rng.random() < 0.42)
    return draw_chart(rng)


def make_row(tokenizer: Tokenizer, rng: random.Random) -> Row:
    row, kind = Row(tokenizer), rng.random()
    if kind < 0.34:
        _one_picture(row, rng)
    elif kind < 0.64:
        _many_pictures(row, rng)
    elif kind < 0.82:
        _several_pictures(row, rng)
    else:
        _conversation(row, rng)
    return row


def _language(rng: random.Random) -> str:
    return rng.choice(LANGUAGES)


def _one_picture(row: Row, rng: random.Random) -> None:
    """A picture, then independent questions, each perhaps with another one after it."""
    picture = draw_scene(rng) if rng.random() < 0.9 else draw_chart(rng)
    row.add("<|im_start|>user\n", 0)
    row.add_picture(picture, 0)
    part = 0
    full = False
    while not full and not (part >= 8 and not picture.things):
        part, before = part + 1, row.lengths()
        asker = Asker(rng, [picture], _language(rng))
        turn = (picture.things and rng.random() < 0.004 and ask_missing(asker)) or ask(asker)
        row.add(turn.question + "<|im_end|>\n<|im_start|>assistant\n", part)
        row.add_answer(turn, part)
        if rng.random() < 0.3 and (more := ask_again(Asker(rng, [picture], turn.language), turn)):
            row.add(f"<|im_start|>user\n{more.question}<|im_end|>\n<|im_start|>assistant\n", part)
            row.add_answer(more, part)
        full = row.cut(before)


def _many_pictures(row: Row, rng: random.Random) -> None:
    """Pictures that have nothing to do with one another, mostly of text, each with one question before or after it."""
    row.add("<|im_start|>user\n", 0)
    part, full = 0, False
    while not full:
        part, before, kind = part + 1, row.lengths(), rng.random()
        text = kind < 0.72
        picture = draw_text(rng, number=kind < 0.22) if text else draw(rng, small=True)
        turn = ask(Asker(rng, [*(p for p, _ in row.pictures), picture], _language(rng), current=len(row.pictures)))
        first = rng.random() < 0.2
        if first:
            row.add(turn.question, part)
        row.add_picture(picture, part)
        row.add(("" if first else turn.question) + "<|im_end|>\n<|im_start|>assistant\n", part)
        row.add_answer(turn, part)
        full = row.cut(before)


def _several_pictures(row: Row, rng: random.Random) -> None:
    """Two or three pictures, and questions that compare them or are about one of them."""
    kind = rng.random()
    number = 2 if rng.random() < 0.55 else 3
    if kind < 0.3:  # of one shape each
        pictures = [draw_scene(rng, small=True, lone=(None, None))]
        thing = pictures[0].things[0]
        alike = (rng.choice((thing.shape, None)), rng.choice((thing.colour, None)))
        pictures.append(draw_scene(rng, small=True, lone=alike))
    elif kind < 0.85:
        pictures = [draw_scene(rng, small=True) for _ in range(number)]
    else:
        pictures = [draw(rng, small=True) for _ in range(number)]
    row.add("<|im_start|>user\n", 0)
    for picture in pictures:
        row.add_picture(picture, 0)
    part, full = 0, False
    while not full:
        part, before = part + 1, row.lengths()
        asker = Asker(rng, pictures, _language(rng), current=rng.randrange(len(pictures)))
        turn = ask_compare(asker) if rng.random() < 0.75 else None
        if turn is None:
            asker.numbered = True
            turn = ask(asker)
        row.add(turn.question + "<|im_end|>\n<|im_start|>assistant\n", part)
        row.add_answer(turn, part)
        full = row.cut(before)


def _conversation(row: Row, rng: random.Random) -> None:
    """Turns one after another, with pictures coming in, in one or both languages."""
    pictures: list[Picture] = []
    before: Turn | None = None
    language, switches = _language(rng), rng.random() < 0.5
    full = False
    while not full:
        lengths = row.lengths()
        if switches and rng.random() < 0.35:
            language = _language(rng)
        row.add("<|im_start|>user\n", 0)
        if len(pictures) < 3 and rng.random() < (0.75 if not pictures else 0.3):
            pictures.append(draw(rng, small=bool(pictures)))
            row.add_picture(pictures[-1], 0)
            before = None
        turn: Turn | None = None
        asker, kind = Asker(rng, pictures, language, current=len(pictures) - 1), rng.random()
        if not pictures or kind < 0.04:
            turn = about(rng, language)
            while pictures and turn.text in phrases.REPLIES["no picture"].values():
                turn = about(rng, language)
        elif before and kind < 0.5:
            turn = ask_again(asker, before)
        elif len(pictures) > 1 and kind < 0.62:
            turn = ask_compare(asker)
        elif len(pictures) > 1 and kind < 0.72:
            asker.current, asker.numbered = rng.randrange(len(pictures)), True
            turn = ask(asker)
        turn = turn or ask(Asker(rng, pictures, language, current=len(pictures) - 1))
        row.add(turn.question + "<|im_end|>\n<|im_start|>assistant\n", 0)
        row.add_answer(turn, 0)
        before = turn if turn.picture == len(pictures) - 1 else None
        full = row.cut(lengths)


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Pads to the longest; the mask lets a token see the beginning and its own part only."""
    length = max(len(row.ids) for row in rows)
    batch = {
        "ids": torch.zeros(len(rows), length, dtype=torch.long),
        "labels": torch.full((len(rows), length), -100),
        "positions": torch.zeros(len(rows), length, dtype=torch.long),
        "parts": torch.full((len(rows), length), -1),
        "turns": torch.full((len(rows), length), -1),
    }
    kinds: list[int] = []
    looks = []
    for b, row in enumerate(rows):
        turns = [t + len(kinds) if t >= 0 else -1 for t in row.turns]
        for key, values in zip(batch, (row.ids, row.labels, row.positions, row.parts, turns), strict=True):
            batch[key][b, : len(values)] = torch.tensor(values)
        kinds += row.kinds
        looks += [(kind, b, position, place, weight) for kind, position, place, weight in row.looks]
    parts = batch.pop("parts")
    same = (parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == 0)
    batch["mask"] = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]  # [B, 1, T, T]
    batch["kinds"] = torch.tensor(kinds)
    batch["looks"] = torch.tensor(looks, dtype=torch.float32).reshape(-1, 5)
    return batch | _tiles([(p, g, x) for row in rows for (p, g), x in zip(row.pictures, row.pixels, strict=True)])


def collate_pictures(pictures: list[tuple[Picture, Grid, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return _tiles(pictures)


def _tiles(pictures: list[tuple[Picture, Grid, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pixels uint8 [N, 3, S, S], classes [N, K, 8], boxes [N, K, 4]."""
    labels = [label(picture, grid) for picture, grid, _ in pictures]
    return {
        "pixels": torch.cat([pixels for *_, pixels in pictures]),
        "classes": torch.from_numpy(np.concatenate([classes for classes, _ in labels])),
        "boxes": torch.from_numpy(np.concatenate([boxes for _, boxes in labels])),
    }
