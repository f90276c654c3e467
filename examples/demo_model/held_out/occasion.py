"""One place in the run of held-out questions: its task and language, its chance, and its share of what is dealt out."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from held_out.drawing import draw
from held_out.phrasings import casual, choose
from held_out.shapes import Scene
from held_out.world import Item, word

T = TypeVar("T")


@dataclass
class Occasion:
    """`turn` counts the questions of this task in this language."""

    task: str
    language: str
    seed: int
    turn: int
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"held out {self.seed} {self.task} {self.language} {self.turn}")

    def deal(self, name: str, options: Iterable[T]) -> T:
        """The options in turn, shuffled anew for each round, so that each comes as often as any other."""
        cards = list(options)
        lap, place = divmod(self.turn, len(cards))
        random.Random(f"deal {self.seed} {self.task} {self.language} {name} {lap}").shuffle(cards)
        return cards[place]

    def say(self, name: str, **words: str) -> str:
        """A question of PHRASINGS with the words put in."""
        return choose(self.rng, name, self.language).format(k=self.rng.choice(["colour", "color"]), **words)

    def word(self, name: str) -> str:
        return word(self.language, name)

    def item(self, kind: str, turns: str | tuple[str, ...], answer: str, *pictures: Scene | bytes) -> Item:
        """Draws the scenes among the pictures."""
        images = tuple(draw(self.rng, picture) if isinstance(picture, Scene) else picture for picture in pictures)
        asked = [turns] if isinstance(turns, str) else turns
        return Item(self.task, self.language, kind, tuple(casual(self.rng, turn) for turn in asked), answer, images)
