"""Questions about pictures and their answers, in English and Chinese, for training the demo model.

This file chooses among all kinds of questions, and has those about written words, charts, several pictures and none.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import phrases
from asker import Asker, Piece, Points, Turn, article, colour_piece, loosely, place_of, place_piece, shape_piece
from kinds import (
    ask_box,
    ask_colour,
    ask_count,
    ask_describe,
    ask_each,
    ask_is,
    ask_json,
    ask_presence,
    ask_shape,
    count_reply,
    many,
)
from layout import ask_edge, ask_neighbour, ask_relative, ask_size, ask_where
from world import COLOURS, SHAPES, name


def ask_text(a: Asker) -> Turn:
    picture = a.pictures[a.current]
    kind = "number" if picture.text.isdigit() else "word"
    letters = tuple(Piece(letter.character, ((a.current, *letter.centre),)) for letter in picture.letters)
    before, after = phrases.ANSWERS[kind][a.language].split("{text}")
    key = "text" if a.rng.random() < 0.3 else kind
    return a.turn(kind, a.say(key), (Piece(before), *letters, Piece(after)))


def ask_chart(a: Asker) -> Turn:
    bars = a.pictures[a.current].bars
    at = [(a.current, (b.box[0] + b.box[2]) / 2, (b.box[1] + b.box[3]) / 2) for b in bars]
    heights = [b.height for b in bars]
    kind, zh = a.rng.random(), a.language == "zh"
    if kind < 0.45:
        tallest = a.rng.random() < 0.6
        best = max(heights) if tallest else min(heights)
        if heights.count(best) == 1:
            i = heights.index(best)
            key = "tallest" if tallest else "shortest"
            return a.turn("chart_best", a.say(key), a.reply(key, bar=Piece("ABCDE"[i], (at[i],), tuple(at))))
    if kind < 0.85:
        i = a.rng.randrange(len(bars))
        answer = a.reply("height", bar="ABCDE"[i], height=Piece(str(heights[i]), (at[i],)))
        return a.turn("chart_height", a.say("height", bar="ABCDE"[i]), answer)
    if kind < 0.92:
        return a.turn("chart_best", a.say("how many bars"), a.reply("bars", count=Piece(str(len(bars)), tuple(at))))
    comma, last = ("、", "和") if zh else (", ", " and ")
    pieces = [Piece("条形图：" if zh else "A bar chart: ")]
    for i, height in enumerate(heights):
        pieces += [Piece((last if i == len(bars) - 1 else comma if i else "") + "ABCDE"[i] + ("是" if zh else " is "))]
        pieces += [Piece(str(height), (at[i],))]
    return a.turn("describe", a.say("describe"), (*pieces, Piece("。" if zh else ".")))


SCENE_TASKS: tuple[tuple[Callable[[Asker], Turn | None], float], ...] = (
    (ask_shape, 1.0),
    (ask_colour, 1.3),
    (ask_count, 2.6),
    (ask_where, 1.2),
    (ask_relative, 1.2),
    (ask_neighbour, 0.7),
    (ask_edge, 0.6),
    (ask_size, 1.2),
    (ask_presence, 1.4),
    (ask_is, 0.5),
    (ask_describe, 0.7),
    (ask_each, 0.7),
    (ask_box, 1.1),
    (ask_json, 1.0),
)


def ask(a: Asker) -> Turn:
    """A question about the current picture."""
    picture = a.pictures[a.current]
    if picture.letters:
        return ask_text(a)
    if picture.bars:
        return ask_chart(a)
    while True:
        make = a.rng.choices([t for t, _ in SCENE_TASKS], [w for _, w in SCENE_TASKS])[0]
        if turn := make(a):
            return turn


def ask_again(a: Asker, before: Turn) -> Turn | None:
    """A question that leaves out what the turn before was about."""
    thing, rng = before.thing, a.rng
    if before.kind and rng.random() < (0.4 if thing else 1.0):
        one, found = a.one(*before.kind), a.of(*before.kind)
        if before.task == "count" or not found:
            return None
        return a.turn("follow_up", a.say("and count"), count_reply(a, found, one), thing)
    if thing is None or thing not in a.things:
        return None
    kind = rng.choice([k for k in ("colour", "shape", "where", "box", "same", "is") if k != before.task])
    if kind == "colour":
        turn = a.turn("follow_up", a.say("and colour"), a.reply("it is colour", colour=colour_piece(a, thing)), thing)
    elif kind == "shape":
        turn = a.turn("follow_up", a.say("and shape"), a.reply("it is shape", shape=shape_piece(a, thing)), thing)
    elif kind == "where" and place_of(thing):
        turn = a.turn("follow_up", a.say("and where"), a.reply("it is at", place=place_piece(a, thing)), thing)
    elif kind == "same":
        found = a.of(thing.shape, None)
        turn = a.turn("follow_up", a.say("and count of that"), count_reply(a, found, a.name(thing.shape)), thing)
    elif kind == "is":
        colour = thing.colour if rng.random() < 0.5 else rng.choice(list(COLOURS))
        answer = a.reply("yes it is" if colour == thing.colour else "no it is", colour=colour_piece(a, thing))
        answer = (Piece(answer[0].text, a.at(thing)), *answer[1:])
        turn = a.turn("follow_up", a.say("and is", colour=a.name(colour)), answer, thing)
    else:
        return None
    return turn


def ask_compare(a: Asker) -> Turn | None:
    """About two or three pictures at once."""
    rng, pictures = a.rng, a.pictures
    if any(not p.things for p in pictures):
        return None
    everything: Points = tuple((i, *t.centre) for i, p in enumerate(pictures) for t in p.things)
    if len(pictures) == 2 and all(len(p.things) == 1 for p in pictures) and rng.random() < 0.7:
        one, other = (p.things[0] for p in pictures)
        key = rng.choice(("same shape", "same colour"))
        same = one.shape == other.shape if key == "same shape" else one.colour == other.colour
        reply = a.reply("yes" if same else "no", rest="")
        return a.turn("compare", a.say(key), (Piece(reply[0].text, everything), *reply[1:]))
    kind = rng.choice(("more", "which has", "which has"))
    shape, colour = rng.choice([(s, None) for s in SHAPES] * 5 + [(None, c) for c in COLOURS] * 4 + [(None, None)] * 25)
    if kind == "which has":
        shape, colour = rng.choice(
            [(t.shape, None) for p in pictures for t in p.things] + [(None, t.colour) for p in pictures for t in p.things]
        )
    found = [[t for t in p.things if shape in (None, t.shape) and colour in (None, t.colour)] for p in pictures]
    counts = [len(f) for f in found]
    best = counts.index(max(counts))
    one = a.one(shape, colour)
    if kind == "which has" and sum(c > 0 for c in counts) != 1:
        return None
    if counts.count(max(counts)) != 1:
        return None
    seen: Points = tuple((best, *t.centre) for t in found[best])
    every: Points = tuple((i, *t.centre) for i, f in enumerate(found) for t in f)
    piece = Piece(f"picture {best + 1}" if a.language == "en" else f"第{'一二三'[best]}张", seen, every)
    if kind == "which has":
        things = article(one) if a.language == "en" else one
        return a.turn("compare", a.say("which has", thing=things), a.reply("which has", picture=piece, thing=things))
    key = "which more" if len(pictures) == 2 else "which most"
    things = many(a, one)
    return a.turn("compare", a.say(key, things=things), a.reply(key, picture=piece, things=things))


def ask_missing(a: Asker) -> Turn | None:
    """About a thing that is not there."""
    shape = a.rng.choice([s for s in SHAPES if all(t.shape != s for t in a.things)])
    key = a.rng.choice(("colour", "where"))
    called = a.name(shape)
    answer = a.reply("none", thing=called)
    return a.turn(key, a.say(key, thing=called), (Piece(answer[0].text, a.end()), *answer[1:]))


def about(rng: random.Random, language: str) -> Turn:
    """Plain text: who it is, what it can do, what it cannot, and that there is no picture."""
    kind = rng.choice(("who", "can", "hello", "thanks", "beyond", "beyond", "beyond", "no picture"))
    if kind == "no picture":
        key, values = rng.choice(
            (
                ("colour", {"thing": name(rng.choice(list(SHAPES)), language)}),
                ("describe", {}),
                ("lone shape", {}),
                ("tallest", {}),
            )
        )
        question = rng.choice(phrases.PHRASES[key][language]).format(**values)
    else:
        question = loosely(rng, rng.choice(phrases.TALK[kind][language]), language)
    return Turn("about", language, question, (Piece(phrases.REPLIES[kind][language]),))
