"""Questions about what things are, how many, and lists of them in several forms; see `asker`."""

from __future__ import annotations

import phrases
from asker import Asker, Piece, Turn, article, colour_piece, full_piece, place_of, place_piece, plural, shape_piece
from pictures import Kind, Thing
from world import COLOURS, SHAPES


def ask_shape(a: Asker) -> Turn | None:
    if len(a.things) == 1:
        thing = a.things[0]
        if a.rng.random() < 0.7:
            return a.turn("shape", a.say("lone shape"), a.reply("it is shape", shape=shape_piece(a, thing)), thing)
    found = a.pick("colour")
    if not found:
        return None
    thing, _ = found
    colour = a.name(thing.colour)
    answer = a.reply("shape", colour=colour, shape=shape_piece(a, thing))
    return a.turn("shape", a.say("shape", colour=colour), answer, thing)


def ask_colour(a: Asker) -> Turn | None:
    if len(a.things) == 1 and a.rng.random() < 0.5:
        thing = a.things[0]
        return a.turn("colour", a.say("lone colour"), a.reply("it is colour", colour=colour_piece(a, thing)), thing)
    found = a.pick("shape")
    if not found:
        return None
    thing, called = found
    answer = a.reply("colour", thing=called, colour=colour_piece(a, thing))
    return a.turn("colour", a.say("colour", thing=called), answer, thing)


def wanted(a: Asker) -> Kind:
    """A shape, colour, both or neither to be counted or looked for; of what is there, as often many as few."""
    rng = a.rng
    if rng.random() < 0.2:  # which may not be there
        shape, colour = rng.choice(list(SHAPES)), rng.choice(list(COLOURS))
        thing = rng.choice(a.things)
        return rng.choice(((shape, None), (None, colour), (shape, thing.colour), (thing.shape, colour)))
    by_number: dict[int, list[Kind]] = {}
    for t in a.things:
        for kind in ((t.shape, None), (None, t.colour), (t.shape, t.colour)):
            by_number.setdefault(len(a.of(*kind)), []).append(kind)
    by_number.setdefault(len(a.things), []).append((None, None))
    return rng.choice(by_number[rng.choice(sorted(by_number))])


def ask_count(a: Asker) -> Turn:
    shape, colour = wanted(a)
    found, one = a.of(shape, colour), a.one(shape, colour)
    thing = found[0] if len(found) == 1 else None
    return a.turn("count", a.say("count", things=many(a, one)), count_reply(a, found, one), thing, (shape, colour))


def count_reply(a: Asker, found: tuple[Thing, ...], one: str) -> tuple[Piece, ...]:
    count = Piece(str(len(found)), a.at(*found) + a.end())
    return a.reply("one" if len(found) == 1 else "count", count=count, things=many(a, one, len(found)))


def many(a: Asker, one: str, number: int = 2) -> str:
    return plural(one, number) if a.language == "en" else one


def ask_presence(a: Asker) -> Turn:
    shape, colour = None, None
    while not (shape or colour):
        shape, colour = wanted(a)
    found, one = a.of(shape, colour), a.one(shape, colour)
    if found and a.rng.random() < 0.3:  # more than some number
        least = max(1, len(found) + a.rng.choice((-2, -1, 0, 1)))
        yes = len(found) > least
        reply = a.reply("yes" if yes else "no", rest=Piece("", ()))
        answer = (Piece(reply[0].text, a.at(*found) + a.end()), *reply[1:])
        number = phrases.NUMBERS[a.language][least] if a.rng.random() < 0.6 else str(least)
        return a.turn("yes_no", a.say("more than", number=number, things=many(a, one)), answer)
    text = article(one) if a.language == "en" else one
    answer = a.reply("there is" if found else "there is no", thing=text if found else one)
    answer = (Piece(answer[0].text, a.at(*found) or a.end()), *answer[1:])
    question = a.say("presence", thing=text, things=many(a, one))
    return a.turn("yes_no", question, answer, found[0] if len(found) == 1 else None, (shape, colour) if found else None)


def ask_is(a: Asker) -> Turn | None:
    """Is the star red?"""
    found = a.pick("shape")
    if not found:
        return None
    thing, called = found
    colour = thing.colour if a.rng.random() < 0.5 else a.rng.choice([c for c in COLOURS if c != thing.colour])
    key = "yes it is" if colour == thing.colour else "no it is"
    answer = a.reply(key, colour=colour_piece(a, thing))
    answer = (Piece(answer[0].text, a.at(thing)), *answer[1:])
    return a.turn("yes_no", a.say("is colour", thing=called, colour=a.name(colour)), answer, thing)


def listing(a: Asker, pieces: list[Piece]) -> tuple[Piece, ...]:
    """With commas and an "and"."""
    comma, last = (", ", " and ") if a.language == "en" else ("、", "和")
    out: list[Piece] = []
    for i, piece in enumerate(pieces):
        out += [Piece(last if i == len(pieces) - 1 else comma), piece] if i else [piece]
    return tuple(out)


def ask_describe(a: Asker) -> Turn | None:
    if len(a.things) > 6:
        return None
    begin, end = phrases.ANSWERS["describe"][a.language].split("{things}")
    pieces = listing(a, [full_piece(a, t) for t in a.things])
    return a.turn("describe", a.say("describe"), (Piece(begin), *pieces, Piece(end)), a.things[0] if len(a.things) == 1 else None)


def ask_each(a: Asker) -> Turn | None:
    """The colour or the place of every shape, which teaches to look each of them up."""
    named = [(t, called) for t in a.things if (called := a.called(t, "shape"))]
    if len(named) < 2 or len(a.things) > 6:
        return None
    a.rng.shuffle(named)
    key = a.rng.choice(("each colour", "each place"))
    if key == "each place":
        named = [(t, c) for t, c in named if place_of(t)]
    if len(named) < 2:
        return None
    piece = colour_piece if key == "each colour" else place_piece
    asked = listing(a, [Piece(("the " if a.language == "en" else "") + called) for _, called in named])
    pieces: list[Piece] = []
    for i, (thing, called) in enumerate(named):
        if a.language == "en":
            pieces += [Piece(("The " if i == 0 else ", the ") + called + " is "), piece(a, thing)]
        else:
            middle = "是" if key == "each colour" else "在"
            pieces += [Piece(("" if i == 0 else "，") + called + middle), piece(a, thing)]
    question = a.say(key, things="".join(p.text for p in asked))
    return a.turn("describe", question, (*pieces, Piece("." if a.language == "en" else "。")))


def ask_box(a: Asker) -> Turn | None:
    found = a.pick()
    if not found:
        return None
    thing, called = found
    left, top, right, bottom = (min(1000, max(0, round(v * 100) * 10)) for v in thing.box)
    box = Piece(f"{left}, {top}, {right}, {bottom}", a.at(thing))
    answer = (Piece(f"<ref>{called}</ref><box>[["), box, Piece("]]</box>"))
    return a.turn("box", a.say("box", thing=called), answer, thing)


def ask_json(a: Asker) -> Turn | None:
    kind = a.rng.choice(("colour", "shape", "count", "list", "list"))
    if kind == "list":
        if len(a.things) > 5:
            return None
        pieces = []
        for i, t in enumerate(a.things):
            pieces += [Piece('{"colour": "' if i == 0 else '}, {"colour": "'), Piece(a.name(t.colour), a.at(t))]
            pieces += [Piece('", "shape": "'), Piece(a.name(t.shape), a.at(t)), Piece('"')]
        return a.turn("json", a.say("json list"), (Piece("["), *pieces, Piece("}]")))
    base = {"colour": ask_colour, "shape": ask_shape, "count": ask_count}[kind](a)
    if not base:
        return None
    value = next(p for p in base.answer if p.seen)
    text = value.text.split()[-1]
    quote = "" if kind == "count" else '"'
    answer = (Piece(f'{{"{kind}": {quote}'), Piece(text, value.seen), Piece(quote + "}"))
    numbered, a.numbered = a.numbered, False
    question = base.question + (" " if a.language == "en" else "") + a.say("as json")
    a.numbered = numbered
    return a.turn("json", question, answer, base.thing)
