"""Turns of a conversation about pictures, and what every kind of question needs: names, phrasings, answers that point.

An answer is a list of pieces; a piece can say where in which picture it is to be seen, which training uses to teach the
model where to look.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import phrases
from pictures import Kind, Picture, Thing
from world import PLACES, name

Points = tuple[tuple[int, float, float], ...]  # picture, x and y as shares of its width and height
NOWHERE = -1.0  # as x: the end of the picture, where nothing is to be seen


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    seen: Points = ()  # where the answer is to be seen
    via: Points = ()  # what has to be found before it; the same where there is no such thing


def loosely(rng: random.Random, text: str, language: str) -> str:
    """The question as it may also be written: another word for picture, a few words before it, no capital, no full stop."""
    for old, new in phrases.OTHER_WORDS[language]:
        if old in text and rng.random() < 0.3:
            text = text.replace(old, new)
    if rng.random() < 0.12:
        before = rng.choice(phrases.OPENINGS[language])
        text = before + (text[0].lower() + text[1:] if before[-2:] != ". " else text)
    if rng.random() < 0.2:
        text = text[0].lower() + text[1:]
    return text.rstrip(".?。？") if rng.random() < 0.15 else text


@dataclass(frozen=True, slots=True)
class Turn:
    task: str
    language: str
    question: str
    answer: tuple[Piece, ...]
    thing: Thing | None = None  # what "it" in the next question can mean
    picture: int = 0
    kind: Kind | None = None  # what "them" in the next question can mean

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.answer)


class Asker:
    """Makes turns about the pictures of one conversation; a question without a picture's number is about `current`."""

    def __init__(self, rng: random.Random, pictures: list[Picture], language: str, *, current: int = 0) -> None:
        self.rng, self.pictures, self.language, self.current = rng, pictures, language, current
        self.numbered = False  # whether the question says which picture it is about

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.pictures[self.current].things

    def say(self, key: str, **values: str) -> str:
        """One phrasing of `key` in the conversation's language, filled in."""
        text = loosely(self.rng, self.rng.choice(phrases.PHRASES[key][self.language]).format(**values), self.language)
        if self.numbered and self.language == "en":
            number = ("first", "second", "third")[self.current]
            where = self.rng.choice((f"In picture {self.current + 1}, ", f"In the {number} picture, "))
            return where + text[0].lower() + text[1:]
        if self.numbered:
            return f"第{'一二三'[self.current]}张图里，" + text
        return text

    def reply(self, key: str, **values: str | Piece) -> tuple[Piece, ...]:
        """The answer form `key` as pieces: values that are pieces keep what they point at."""
        pieces, rest = [], phrases.ANSWERS[key][self.language]
        while "{" in rest:
            before, _, rest = rest.partition("{")
            field, _, rest = rest.partition("}")
            value = values[field]
            pieces += [Piece(before), value if isinstance(value, Piece) else Piece(value)]
        return tuple(p for p in (*pieces, Piece(rest)) if p.text)

    def turn(
        self, task: str, question: str, answer: tuple[Piece, ...], thing: Thing | None = None, kind: Kind | None = None
    ) -> Turn:
        return Turn(task, self.language, question, answer, thing, self.current, kind)

    def of(self, shape: str | None, colour: str | None) -> tuple[Thing, ...]:
        """The things of a shape, of a colour, or of both."""
        return tuple(t for t in self.things if shape in (None, t.shape) and colour in (None, t.colour))

    def name(self, key: str) -> str:
        return name(key, self.language)

    def at(self, *things: Thing) -> Points:
        return tuple((self.current, *t.centre) for t in things)

    def end(self) -> Points:
        return ((self.current, NOWHERE, NOWHERE),)

    def called(self, thing: Thing, by: str = "shape colour both") -> str | None:
        """A name that means this thing alone: "star", "red shape", "red one" or "red star"; without article."""
        ways = []
        if "shape" in by and sum(t.shape == thing.shape for t in self.things) == 1:
            ways += [self.name(thing.shape)] * 2
        if "colour" in by and sum(t.colour == thing.colour for t in self.things) == 1:
            some = self.one(None, thing.colour)
            ways.append(f"{self.name(thing.colour)} one" if self.language == "en" and self.rng.random() < 0.5 else some)
        if "both" in by and sum((t.shape, t.colour) == (thing.shape, thing.colour) for t in self.things) == 1:
            ways.append(self.one(thing.shape, thing.colour))
        return self.rng.choice(ways) if ways else None

    def one(self, shape: str | None, colour: str | None) -> str:
        """ "red star", "star", "red shape" or "shape"; 红色的星形, 星形, 红色的图形, 图形."""
        noun = self.name(shape) if shape else ("shape" if self.language == "en" else "图形")
        if not colour:
            return noun
        return f"{self.name(colour)} {noun}" if self.language == "en" else f"{self.name(colour)}的{noun}"

    def pick(self, by: str = "shape colour both") -> tuple[Thing, str] | None:
        """A thing that can be named, and its name."""
        for thing in self.rng.sample(self.things, len(self.things)):
            if called := self.called(thing, by):
                return thing, called
        return None


def article(text: str) -> str:
    return ("an " if text[0] in "aeio" else "a ") + text


def plural(text: str, number: int) -> str:
    return text if number == 1 else text + ("es" if text.endswith("s") else "s")


def shape_piece(a: Asker, thing: Thing) -> Piece:
    shape = a.name(thing.shape)
    return Piece(article(shape) if a.language == "en" else shape, a.at(thing))


def full_piece(a: Asker, thing: Thing) -> Piece:
    text = a.one(thing.shape, thing.colour)
    return Piece(article(text) if a.language == "en" else text, a.at(thing))


def colour_piece(a: Asker, thing: Thing) -> Piece:
    return Piece(a.name(thing.colour), a.at(thing))


def place_of(thing: Thing) -> str | None:
    """Its ninth of the picture; None near a border of two."""
    x, y = thing.centre
    if any(abs(v - border) < 0.035 for v in (x, y) for border in (1 / 3, 2 / 3)):
        return None
    column, row = ("left", "", "right")[int(x * 3)], ("top", "", "bottom")[int(y * 3)]
    return f"{row} {column}".strip() or "centre"


def place_piece(a: Asker, thing: Thing) -> Piece:
    return Piece(PLACES[place_of(thing) or "centre"][a.language == "zh"], a.at(thing))


def side_of(thing: Thing, other: Thing, axis: str = "any") -> str | None:
    """Where the first is, seen from the other, if that is clear."""
    dx, dy = (p - q for p, q in zip(thing.centre, other.centre, strict=True))
    if axis == "x" or (axis == "any" and abs(dx) > 1.6 * abs(dy)):
        return ("left" if dx < 0 else "right") if abs(dx) > 0.12 else None
    if axis == "y" or abs(dy) > 1.6 * abs(dx):
        return ("above" if dy < 0 else "below") if abs(dy) > 0.12 else None
    return None


def two(a: Asker) -> tuple[Thing, str, Thing, str] | None:
    named = [(t, called) for t in a.things if (called := a.called(t))]
    if len(named) < 2:
        return None
    (thing, called), (other, other_called) = a.rng.sample(named, 2)
    return thing, called, other, other_called
