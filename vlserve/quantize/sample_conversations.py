"""Conversations made up here, to calibrate with when there are none of one's own: coloured shapes that are drawn, and small talk.

The same seed gives the same conversations and pixels. No torch here.
"""

from __future__ import annotations

import random
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "orange": (240, 140, 20),
    "yellow": (245, 210, 30),
    "green": (40, 150, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle")
GROUNDS = ((255, 255, 255), (236, 228, 214), (210, 226, 240), (222, 240, 222))
SIDES = (96, 160, 224, 320, 448)  # pixels
FACTS = (
    ("How many days does a week have?", "A week has seven days, from Monday to Sunday."),
    ("What is the capital of France?", "The capital of France is Paris, on the river Seine."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so blue reaches our eyes from every direction."),
    ("What does a bee do with nectar?", "It carries the nectar to the hive, where it becomes honey."),
    ("Wie heißt der höchste Berg der Alpen?", "Der höchste Berg der Alpen ist der Mont Blanc mit etwa 4800 Metern."),
    ("Qu'est-ce qu'une bibliothèque ?", "C'est un lieu où l'on garde des livres que chacun peut emprunter."),
    ("水在多少度结冰？", "在标准大气压下，水在零摄氏度结冰。"),
    ("How do I boil an egg?", "Put it into boiling water for six to ten minutes, then cool it under cold water."),
    ("Write a function that adds two numbers in Python.", "```python\ndef add(a, b):\n    return a + b\n```"),
    ("What is a prime number?", "A whole number above one that only one and the number itself divide."),
    ("Give me three words that rhyme with night.", "1. light\n2. kite\n3. bright"),
    ("Is a whale a fish?", "No. Whales are mammals: they breathe air and feed their young with milk."),
)

Messages = list[dict[str, Any]]


def make_conversation(seed: int, index: int, *, with_picture: bool) -> Messages:
    """OpenAI-style messages that end with an answer; pictures are PIL images."""
    rng = random.Random(f"{seed}-{index}")
    if not with_picture:
        return [message for _ in range(rng.randint(1, 3)) for message in _talk(*_text_question(rng))]
    image, things = _draw(rng)
    [(question, answer), *others] = rng.sample(_picture_questions(rng, things), rng.randint(1, 3))
    opening: dict[str, Any] = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    messages = [opening, {"role": "assistant", "content": answer}]
    return messages + [message for pair in others for message in _talk(*pair)]


def _talk(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


Thing = tuple[str, str, int, int]  # shape, colour, row, column


def _draw(rng: random.Random) -> tuple[Image.Image, list[Thing]]:
    """One to five shapes in different fields of a grid of three by three."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    image = Image.new("RGB", (width, height), rng.choice(GROUNDS))
    draw = ImageDraw.Draw(image)
    things = []
    for field in rng.sample(range(9), rng.randint(1, 5)):
        row, column = divmod(field, 3)
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        radius = min(width, height) / 6 * rng.uniform(0.6, 0.95)
        x, y = width * (2 * column + 1) / 6, height * (2 * row + 1) / 6
        _paint(draw, shape, COLOURS[colour], (x - radius, y - radius, x + radius, y + radius))
        things.append((shape, colour, row, column))
    return image, things


def _paint(draw: ImageDraw.ImageDraw, shape: str, rgb: tuple[int, int, int], box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = box
    if shape == "circle":
        draw.ellipse(box, fill=rgb)
    elif shape == "square":
        draw.rectangle(box, fill=rgb)
    else:
        draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=rgb)


def _picture_questions(rng: random.Random, things: list[Thing]) -> list[tuple[str, str]]:
    """Questions with their answers, which are right: three for any picture, more where a shape or colour comes once."""
    names = [_a(f"{colour} {shape}") for shape, colour, _, _ in sorted(things, key=lambda thing: (thing[3], thing[2]))]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    one = f"{colour} {shape}"
    is_there = (shape, colour) in {thing[:2] for thing in things}
    found = [
        (rng.choice(("Describe the picture.", "What is in the picture?", "What do you see?")), f"The picture shows {listed}."),
        (
            rng.choice(("How many shapes are there?", "How many shapes do you see?")),
            f"There are {len(things)} shapes." if len(things) > 1 else "There is 1 shape.",
        ),
        (f"Is there {_a(one)}?", f"Yes, there is {_a(one)}." if is_there else f"No, there is no {one}."),
    ]
    for thing in things:
        if sum(other[0] == thing[0] for other in things) == 1:
            found.append((f"What colour is the {thing[0]}?", f"The {thing[0]} is {thing[1]}."))
        if sum(other[1] == thing[1] for other in things) == 1:
            found.append((f"What shape is the {thing[1]} one?", f"The {thing[1]} one is {_a(thing[0])}."))
    return found


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _text_question(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.6:
        return rng.choice(FACTS)
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    kind = rng.randrange(3)
    if kind == 0:
        return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
    if kind == 1:
        return f"What is {a} times {b}?", f"{a} times {b} is {a * b}."
    words = rng.sample(("pear", "stone", "river", "apple", "window", "garden", "letter", "bread"), 4)
    return f"Sort these words: {', '.join(words)}.", f"In order: {', '.join(sorted(words))}."
