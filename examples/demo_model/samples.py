"""Training samples: a picture's tiles, several questions about it in one row of tokens, and what is to be learnt.

Each question sees the picture and itself, never another question, so the picture is encoded once for all of
them. Shapes: B samples, T tokens, N tiles, K image tokens a tile.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from model import IMAGE
from pictures import COLOURS, SHAPES, Thing, draw_scene
from questions import about, conversations
from tokenizers import Tokenizer

from vlserve.vision.preprocess import make_tiles
from vlserve.vision.tiling import Grid

QUESTIONS_PER_PICTURE = 5


@dataclass(frozen=True, slots=True)
class Sample:
    ids: list[int]
    labels: list[int]  # -100 where nothing is learnt
    positions: list[int]
    parts: list[int]  # 0 for the shared beginning, k for the k-th question
    pixels: torch.Tensor | None  # [N, 3, S, S] uint8
    places: torch.Tensor | None  # [N, K, 2] the colour and shape at each image token, 0 for none


class Samples(torch.utils.data.IterableDataset):
    """Samples from `start` on, in order; `hardness(i)` sets how varied picture i is."""

    def __init__(self, tokenizer: Tokenizer, seed: int, start: int, end: int, ramp: tuple[int, int], hard_from: int) -> None:
        self.tokenizer, self.seed, self.start, self.end = tokenizer, seed, start, end
        self.ramp, self.hard_from = ramp, hard_from

    def __iter__(self) -> Iterator[Sample]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for i in range(self.start + first, self.end, step):
            low, high = self.ramp
            hardness = 0.65 * min(1.0, max(0.0, (i - low) / max(1, high - low)))
            yield make_sample(self.tokenizer, random.Random(f"picture-{self.seed}-{i}"), hardness, i >= self.hard_from)


def make_sample(tokenizer: Tokenizer, rng: random.Random, hardness: float, hard_questions: bool = False) -> Sample:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    pixels = places = None
    picture_ids: list[int] = []
    kind = rng.random()
    if kind < 0.03:
        talks = [about(rng) for _ in range(4)]
    else:
        image, things = draw_scene(rng, hardness)
        while hard_questions and len({thing.shape for thing in things}) < 2 and rng.random() < 0.7:
            image, things = draw_scene(rng, hardness)
        tiles = make_tiles(image, IMAGE)
        pixels = tiles.pixels
        places = label_places(things, image.width, image.height, tiles.grid)
        context = tokenizer.token_to_id("<IMG_CONTEXT>")
        picture_ids = [tokenizer.token_to_id("<img>"), *[context] * tiles.num_tokens, tokenizer.token_to_id("</img>")]
        talks = conversations(rng, things, QUESTIONS_PER_PICTURE, hard=hard_questions)
    ids = encode("<|im_start|>user\n")
    close, answer_open = encode("<|im_end|>\n"), encode("<|im_start|>assistant\n")
    if picture_ids and kind < 0.15:  # the question before the picture; then the two cannot be shared
        talks = [rng.choice(talks)]
        ids += encode(talks[0][0][0]) + picture_ids + encode("\n")
    elif picture_ids:
        ids += picture_ids + encode("\n")
    question_first = bool(picture_ids) and kind < 0.15
    labels, parts, positions = [-100] * len(ids), [0] * len(ids), list(range(len(ids)))
    begin = len(ids)
    for part, talk in enumerate(talks, start=1):
        piece: list[int] = []
        learn: list[int] = []
        for n, (question, answer) in enumerate(talk):
            ask = ([] if n == 0 else encode("\n<|im_start|>user\n")) + ([] if n == 0 and question_first else encode(question))
            ask += close + answer_open
            reply = encode(answer) + encode("<|im_end|>")
            piece += ask + reply
            learn += [-100] * len(ask) + reply
        ids += piece
        labels += learn
        parts += [part] * len(piece)
        positions += range(begin, begin + len(piece))
    return Sample(ids, labels, positions, parts, pixels, places)


def label_places(things: list[Thing], width: int, height: int, grid: Grid) -> torch.Tensor:
    """For each tile and image token, which colour and shape (counted from 1) is there; [N, K, 2]."""
    side = round(IMAGE.tokens_per_tile**0.5)
    boxes = [(c, r, grid.columns, grid.rows) for r in range(grid.rows) for c in range(grid.columns)]
    if grid.num_tiles > 1:
        boxes.append((0, 0, 1, 1))
    labels = torch.zeros(len(boxes), side, side, 2, dtype=torch.long)
    short = min(width, height)
    centres = (torch.arange(side) + 0.5) / side
    for n, (column, row, columns, rows) in enumerate(boxes):
        x = (column + centres) / columns * width / short
        y = (row + centres) / rows * height / short
        for thing in things:
            distance = ((x[None, :] - thing.x) ** 2 + (y[:, None] - thing.y) ** 2).sqrt()
            inside = distance < thing.radius * 0.85
            cell = (x[1] - x[0]).item(), (y[1] - y[0]).item()  # at least the token that holds the middle
            inside |= ((x[None, :] - thing.x).abs() <= cell[0] / 2) & ((y[:, None] - thing.y).abs() <= cell[1] / 2)
            labels[n][inside] = torch.tensor([1 + list(COLOURS).index(thing.colour), 1 + SHAPES.index(thing.shape)])
    return labels.flatten(1, 2)


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Pads to the longest; the mask lets a token see the beginning and its own question only."""
    length = max(len(s.ids) for s in samples)
    batch = {
        "ids": torch.zeros(len(samples), length, dtype=torch.long),
        "labels": torch.full((len(samples), length), -100),
        "positions": torch.zeros(len(samples), length, dtype=torch.long),
        "parts": torch.full((len(samples), length), -1),
    }
    for row, s in enumerate(samples):
        for key, values in (("ids", s.ids), ("labels", s.labels), ("positions", s.positions), ("parts", s.parts)):
            batch[key][row, : len(values)] = torch.tensor(values)
    parts = batch.pop("parts")
    same = (parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == 0)
    batch["mask"] = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]  # [B, 1, T, T]
    batch["pixels"] = torch.cat([s.pixels for s in samples if s.pixels is not None])
    batch["places"] = torch.cat([s.places for s in samples if s.places is not None])
    return batch
