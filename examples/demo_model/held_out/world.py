"""What the demo model's world is made of, in its two languages, and how a thing in it is referred to."""

import random
from dataclasses import dataclass
from typing import NamedTuple

LANGUAGES = ("en", "zh")
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "rectangle": "长方形",
    "diamond": "菱形",
    "cross": "十字形",
    "heart": "心形",
}
COLOURS = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "black": "黑色",
    "white": "白色",
    "orange": "橙色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
}
POSITIONS = {
    "left": "左边",
    "right": "右边",
    "top": "上面",
    "bottom": "下面",
    "centre": "中间",
    "top left": "左上角",
    "top right": "右上角",
    "bottom left": "左下角",
    "bottom right": "右下角",
}
SIDES = {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}
NUMBERS = {
    "en": ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九"),
}


class Thing(NamedTuple):
    """What is drawn."""

    shape: str
    colour: str


class Wanted(NamedTuple):
    """What a question is about; None means any."""

    shape: str | None = None
    colour: str | None = None

    def fits(self, thing: Thing) -> bool:
        return self.shape in (None, thing.shape) and self.colour in (None, thing.colour)


@dataclass(frozen=True)
class Item:
    """One conversation and how its last reply is marked.

    Args:
        kind: what sort of thing the answer is, e.g. colour; marking.py has them all.
        turns: the user's messages, asked one after another; the pictures come with the first.
        answer: a right reply to the last turn, in the question's language.
    """

    task: str
    language: str
    kind: str
    turns: tuple[str, ...]
    answer: str
    images: tuple[bytes, ...] = ()
    media_type: str = "image/jpeg"


def word(language: str, name: str) -> str:
    """A shape, colour, position or side in a language."""
    return name if language == "en" else (SHAPES | COLOURS | POSITIONS | SIDES)[name]


def plural(wanted: Wanted) -> str:
    shape = wanted.shape or "shape"
    return f"{wanted.colour or ''} {shape}{'es' if shape == 'cross' else 's'}".strip()


def one(language: str, wanted: Wanted, *, definite: bool = False) -> str:
    """ "red star", "red shape", "star", or with `definite`, for after "the", also "red one"."""
    if language == "en":
        anything = "one" if definite and wanted.colour else "shape"
        return f"{wanted.colour or ''} {wanted.shape or anything}".strip()
    colour = COLOURS[wanted.colour] + "的" if wanted.colour else ""
    return colour + (SHAPES[wanted.shape] if wanted.shape else "图形")


def with_article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def words(language: str, wanted: Wanted) -> dict[str, str]:
    """What a phrasing may say of the wanted: {one}, {the}, {a}, {many}."""
    name = one(language, wanted)
    return {"one": name, "the": one(language, wanted, definite=True), "a": with_article(name), "many": plural(wanted)}


def reference(rng: random.Random, thing: Thing) -> Wanted:
    """One of the ways to point at a thing: by its shape, by its colour, by both."""
    by = rng.choices(["shape", "colour", "both"], [45, 20, 35])[0]
    return Wanted(None if by == "colour" else thing.shape, None if by == "shape" else thing.colour)


def some_wanted(rng: random.Random, *kinds: str) -> Wanted:
    """A random shape, colour, "shape and colour", or anything at all ("all")."""
    kind = rng.choice(kinds)
    return Wanted(rng.choice(list(SHAPES)) if "shape" in kind else None, rng.choice(list(COLOURS)) if "colour" in kind else None)


def crowd(rng: random.Random, fit: Wanted, matching: int, total: int, avoid: Wanted | None = None) -> list[Thing]:
    """So many things that fit, first, and others that do not fit `avoid` (default: `fit`) but often come close."""
    things: list[Thing] = []
    while len(things) < total:
        match = len(things) < matching
        shape, colour = fit if match else rng.choice([(fit.shape, None), (None, fit.colour), (None, None)])
        thing = Thing(shape or rng.choice(list(SHAPES)), colour or rng.choice(list(COLOURS)))
        if match or not (avoid or fit).fits(thing):
            things.append(thing)
    return things


def distinct(rng: random.Random, total: int, first: str | None = None) -> list[Thing]:
    """Things of which no two share shape or colour, so that any of them can be named by either; `first` is the first's shape."""
    shapes = rng.sample([shape for shape in SHAPES if shape != first], total)
    if first is not None:
        shapes = [first, *shapes[1:]]
    return [Thing(shape, colour) for shape, colour in zip(shapes, rng.sample(list(COLOURS), total), strict=True)]
