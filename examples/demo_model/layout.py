"""Questions about where things are and how large; see `asker`."""

from __future__ import annotations

from asker import Asker, Piece, Turn, full_piece, place_of, place_piece, side_of, two
from world import PLACES, SIDES


def ask_where(a: Asker) -> Turn | None:
    found = a.pick()
    if not found or not place_of(found[0]):
        return None
    thing, called = found
    return a.turn("where", a.say("where", thing=called), a.reply("where", thing=called, place=place_piece(a, thing)), thing)


def ask_relative(a: Asker) -> Turn | None:
    pair = two(a)
    if not pair:
        return None
    thing, called, other, other_called = pair
    axis = a.rng.choice(("any", "any", "x", "y"))
    side = side_of(thing, other, axis)
    if not side:
        return None
    key = {"any": "relative", "x": "left or right", "y": "above or below"}[axis]
    question = a.say(key, thing=called, other=other_called)
    zh = a.language == "zh"
    side_piece = Piece(SIDES[side][zh], a.at(thing), a.at(other))
    if a.rng.random() < 0.35:  # as yes or no
        asked = side if a.rng.random() < 0.5 else {"left": "right", "right": "left", "above": "below", "below": "above"}[side]
        answer = a.reply("yes side" if asked == side else "no side", thing=called, other=other_called, side=side_piece)
        answer = (Piece(answer[0].text, a.at(thing), a.at(other)), *answer[1:])
        return a.turn("yes_no", a.say("is side", thing=called, other=other_called, side=SIDES[asked][zh]), answer, thing)
    return a.turn("where", question, a.reply("relative", thing=called, other=other_called, side=side_piece), thing)


def ask_neighbour(a: Asker) -> Turn | None:
    """Which shape is left of the star? Only when one thing alone is."""
    pair = two(a)
    if not pair or len(a.things) > 4:
        return None
    other, called = pair[2:]
    sides = {side_of(t, other): t for t in a.things if t is not other and side_of(t, other)}
    side = a.rng.choice(list(sides)) if sides else None
    axis = "x" if side in ("left", "right") else "y"
    if not side or sum(side_of(t, other, axis) == side for t in a.things if t is not other) != 1:
        return None
    thing = sides[side]
    text = a.one(thing.shape, thing.colour)
    answer = a.reply("neighbour", thing=Piece(text, a.at(thing), a.at(other)))
    return a.turn("where", a.say("neighbour", other=called, side=SIDES[side][a.language == "zh"]), answer, thing)


def ask_edge(a: Asker) -> Turn | None:
    """What shape is on the left? Also at the top, and so on."""
    axis, last = a.rng.choice((0, 1)), a.rng.random() < 0.5
    order = sorted(a.things, key=lambda t: t.centre[axis], reverse=last)
    if len(order) < 2 or abs(order[0].centre[axis] - order[1].centre[axis]) < 0.1:
        return None
    side = (("left", "right"), ("top", "bottom"))[axis][last]
    thing = order[0]
    answer = a.reply("it is", thing=full_piece(a, thing))
    return a.turn("where", a.say("edge", place=PLACES[side][a.language == "zh"]), answer, thing)


def ask_size(a: Asker) -> Turn | None:
    order = sorted(a.things, key=lambda t: t.size)
    if a.rng.random() < 0.5:
        pair = two(a)
        if not pair or max(pair[0].size, pair[2].size) < 1.25 * min(pair[0].size, pair[2].size):
            return None
        thing, called, other, other_called = pair
        more = a.rng.random() < 0.6
        right, right_called = (thing, called) if (thing.size > other.size) == more else (other, other_called)
        key = "larger" if more else "smaller"
        answer = a.reply(key, thing=Piece(right_called, a.at(right), a.at(thing, other)))
        return a.turn("size", a.say(key, thing=called, other=other_called), answer, right)
    largest = a.rng.random() < 0.6
    thing, next_one = (order[-1], order[-2:-1]) if largest else (order[0], order[1:2])
    if not next_one or max(thing.size, next_one[0].size) < 1.2 * min(thing.size, next_one[0].size):
        return None
    key = "largest" if largest else "smallest"
    text = a.one(thing.shape, thing.colour)
    return a.turn("size", a.say(key), a.reply(key, thing=Piece(text, a.at(thing), a.at(*a.things))), thing)
