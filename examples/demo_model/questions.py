"""What is asked about a scene, in many phrasings, and the right answers.

A conversation is a list of (question, answer) turns. This file knows scenes, not pixels or tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from pictures import COLOURS, SHAPES, Thing

Turn = tuple[str, str]
PLURAL = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
IT = ("it", "it", "this", "the shape", "the object")
ANY = ("shapes", "objects", "things", "figures")
WHERE = ("", "", "", " in the picture", " in the image", " here", " in this picture", " in this image")

ABOUT = (
    ("Who are you?", "I am the demo model of vlserve."),
    ("What are you?", "I am the demo model of vlserve."),
    ("What is your name?", "I am the demo model of vlserve."),
    ("What can you do?", "I can name shapes and colours, count up to five, and answer yes or no."),
    ("Help", "Send me a picture with shapes and ask about shape, colour or number."),
    ("Hello", "Hello! Send me a picture with shapes."),
    ("Hi", "Hello! Send me a picture with shapes."),
    ("Hello!", "Hello! Send me a picture with shapes."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
)
NO_PICTURE = "Please send a picture first."


def conversations(rng: random.Random, things: Sequence[Thing], number: int, *, hard: bool = False) -> list[list[Turn]]:
    """`number` independent conversations about one picture; the first describes all of it.

    `hard` asks more often for what is learnt last: to find a thing by its shape, and to count.
    """
    talks = [[_describe(rng, things)]] if not hard or rng.random() < 0.25 else []
    tasks: list[Callable[[random.Random, Sequence[Thing]], Turn | None]] = [_shape, _colour, _count, _yes_no]
    if hard:
        tasks += [_colour, _colour, _colour, _count, _count, _yes_no]
    while len(talks) < number:
        turn = rng.choice(tasks)(rng, things)
        if turn is None:
            continue
        talk = [turn]
        if rng.random() < 0.12:
            follow = rng.choice(tasks)(rng, things)
            if follow is not None:
                question, answer = follow
                talk.append((rng.choice(("And ", "")) + question if rng.random() < 0.5 else question, answer))
        talks.append([(_vary(rng, q), a) for q, a in talk])
    return talks


def about(rng: random.Random) -> list[Turn]:
    """A conversation without a picture."""
    if rng.random() < 0.7:
        question, answer = rng.choice(ABOUT)
        return [(_vary(rng, question), answer)]
    question = rng.choice(
        (
            "What colour is it?",
            "What shape is it?",
            "How many circles are there?",
            "What is in the picture?",
            "Is there a star?",
            "What color is the square?",
            "Describe the picture.",
        )
    )
    return [(_vary(rng, question), NO_PICTURE)]


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _vary(rng: random.Random, question: str) -> str:
    if rng.random() < 0.08:
        question = rng.choice(("Please tell me: ", "Look at the picture. ", "Question: ", "Tell me, ")) + question
    if rng.random() < 0.06:
        question += rng.choice((" Answer in one word.", " Answer briefly.", " Please answer."))
    if rng.random() < 0.5:
        question = question.replace("colour", "color")
    if rng.random() < 0.12:
        question = question.lower()
    if rng.random() < 0.1:
        question = question.rstrip("?.")
    return question


def _describe(rng: random.Random, things: Sequence[Thing]) -> Turn:
    question = rng.choice(
        (
            "What is in the picture?",
            "Describe the picture.",
            "What do you see?",
            "Describe this image.",
            "List the shapes.",
            "What is in this image?",
            "What's in this image?",
            "What does the picture show?",
        )
    )
    names = [_a(f"{t.colour} {t.shape}") for t in sorted(things, key=lambda t: t.x)]
    if not names:
        return question, "Nothing."
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return question, listed[0].upper() + listed[1:] + "."


def _unique(values: Sequence[str]) -> list[str]:
    return [value for value, n in Counter(values).items() if n == 1]


def _shape(rng: random.Random, things: Sequence[Thing]) -> Turn | None:
    where = rng.choice(WHERE)
    if len(things) == 1 and rng.random() < 0.6:
        question = rng.choice(
            (
                f"What shape is {rng.choice(IT)}?",
                f"Which shape do you see{where}?",
                f"What is the shape{where}?",
                f"What shape is shown{where}?",
                "Name the shape.",
                f"Which shape is {rng.choice(IT)}?",
                f"What shape do you see{where}?",
                f"What kind of shape is {rng.choice(IT)}?",
            )
        )
        return question, _sentence(_a(things[0].shape))
    colours = _unique([t.colour for t in things])
    if not colours:
        return None
    colour = rng.choice(colours)
    shape = next(t.shape for t in things if t.colour == colour)
    thing = rng.choice(("object", "thing", "shape", "one", "figure"))
    question = rng.choice(
        (
            f"What shape is the {colour} {thing}{where}?",
            f"What is the {colour} {thing}{where}?",
            f"Which shape is {colour}?",
            f"What shape is {colour}{where}?",
            f"The {colour} {thing} is what shape?",
            f"Name the shape of the {colour} {thing}.",
            f"What shape does the {colour} {thing} have?",
            f"Which shape does the {colour} {thing} have?",
        )
    )
    return question, _sentence(_a(shape))


def _colour(rng: random.Random, things: Sequence[Thing]) -> Turn | None:
    where = rng.choice(WHERE)
    if len(things) == 1 and rng.random() < 0.4:
        it, colour = rng.choice(IT), things[0].colour
        question = rng.choice(
            (f"What colour is {it}?", f"Which colour is {it}?", "Name the colour.", f"What colour does {it} have?")
        )
        return question, _sentence(colour)
    shapes = _unique([t.shape for t in things])
    if not shapes:
        return None
    shape = rng.choice(shapes)
    colour = next(t.colour for t in things if t.shape == shape)
    question = rng.choice(
        (
            f"What colour is the {shape}{where}?",
            f"What is the colour of the {shape}{where}?",
            f"Which colour is the {shape}{where}?",
            f"Which colour does the {shape} have?",
            f"What colour does the {shape} have?",
            f"Tell me the colour of the {shape}.",
            f"The {shape} is what colour?",
            f"Name the colour of the {shape}.",
        )
    )
    return question, _sentence(colour)


def _count(rng: random.Random, things: Sequence[Thing]) -> Turn | None:
    where = rng.choice(WHERE)
    kind = rng.random()
    if kind < 0.3 or not things:
        noun, found = rng.choice(ANY), len(things)
    else:
        model = rng.choice(things)
        shape = model.shape if rng.random() < 0.85 else rng.choice(SHAPES)
        colour = model.colour if rng.random() < 0.85 else rng.choice(tuple(COLOURS))
        if kind < 0.6:
            noun, found = PLURAL[shape], sum(t.shape == shape for t in things)
        elif kind < 0.8:
            noun = f"{colour} {rng.choice(ANY)}"
            found = sum(t.colour == colour for t in things)
        else:
            noun = f"{colour} {PLURAL[shape]}"
            found = sum(t.colour == colour and t.shape == shape for t in things)
    question = rng.choice(
        (
            f"How many {noun} are there{where}?",
            f"How many {noun} are there{where}?",
            f"How many {noun} do you see{where}?",
            f"How many {noun} can you see{where}?",
            f"How many {noun} are in the {rng.choice(('picture', 'image'))}?",
            f"How many {noun}?",
            f"Count the {noun}.",
            f"What is the number of {noun}{where}?",
            f"How many {noun} does the {rng.choice(('picture', 'image'))} show?",
        )
    )
    return question, f"{found}."


def _yes_no(rng: random.Random, things: Sequence[Thing]) -> Turn | None:
    where = rng.choice(WHERE)
    want = rng.random() < 0.5
    kind = rng.random()
    if kind < 0.35:  # a colour and a shape together
        pairs = {(t.colour, t.shape) for t in things}
        near = [(c, t.shape) for t in things for c in COLOURS] + [(t.colour, s) for t in things for s in SHAPES]
        pool = sorted(pairs) if want else [p for p in near if p not in pairs]
        if not pool:
            return None
        colour, shape = rng.choice(pool)
        noun, plural = _a(f"{colour} {shape}"), f"{colour} {PLURAL[shape]}"
    elif kind < 0.6:
        present = sorted({t.shape for t in things})
        pool_s = present if want else [s for s in SHAPES if s not in present]
        if not pool_s:
            return None
        shape = rng.choice(pool_s)
        noun, plural = _a(shape), PLURAL[shape]
    elif kind < 0.8:
        present = sorted({t.colour for t in things})
        pool_c = present if want else [c for c in COLOURS if c not in present]
        if not pool_c:
            return None
        colour = rng.choice(pool_c)
        thing = rng.choice(("object", "shape", "thing"))
        noun, plural = rng.choice((_a(f"{colour} {thing}"), f"anything {colour}", f"something {colour}")), f"{colour} {thing}s"
    elif kind < 0.92:
        shapes = _unique([t.shape for t in things])
        if not shapes:
            return None
        shape = rng.choice(shapes)
        real = next(t.colour for t in things if t.shape == shape)
        colour = real if want else rng.choice([c for c in COLOURS if c != real])
        question = rng.choice(
            (
                f"Is the {shape} {colour}?",
                f"Is the colour of the {shape} {colour}?",
                f"Does the {shape} have the colour {colour}?",
            )
        )
        return question, _sentence("yes" if want else "no")
    else:
        if not things:
            return None
        if len(things) == 1 and rng.random() < 0.5:
            real_s = things[0].shape
            shape = real_s if want else rng.choice([s for s in SHAPES if s != real_s])
            return f"Is {rng.choice(IT)} {_a(shape)}?", _sentence("yes" if want else "no")
        shape = rng.choice(things).shape
        found = sum(t.shape == shape for t in things)
        asked = found if want else rng.choice([n for n in range(1, 6) if n != found])
        noun = PLURAL[shape] if asked != 1 else shape
        return f"{'Is' if asked == 1 else 'Are'} there {asked} {noun}{where}?", _sentence("yes" if want else "no")
    question = rng.choice(
        (
            f"Is there {noun}{where}?",
            f"Is there {noun}{where}?",
            f"Do you see {noun}{where}?",
            f"Can you see {noun}{where}?",
            f"Does the {rng.choice(('picture', 'image'))} show {noun}?",
            f"Are there any {plural}{where}?",
            f"Are there {plural}{where}?",
            f"Is {noun} in the {rng.choice(('picture', 'image'))}?",
        )
    )
    return question, _sentence("yes" if want else "no")


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."
