"""Held-out questions with one picture, asked once: each makes a scene in which its answer is the only right one."""

from collections import Counter
from collections.abc import Sequence

from held_out.charts import LABELS, draw_chart
from held_out.lettering import WORDS, styled, write
from held_out.occasion import Occasion
from held_out.phrasings import BESIDE, MORE, MOST, TALLEST
from held_out.shapes import ATTEMPTS, Placed, Scene, layout, layout_where, least_scale, picture_size
from held_out.world import (
    COLOURS,
    NUMBERS,
    POSITIONS,
    SHAPES,
    SIDES,
    Item,
    Thing,
    Wanted,
    crowd,
    distinct,
    one,
    plural,
    reference,
    some_wanted,
    with_article,
    words,
)

SOME = ("shape", "colour", "shape and colour")
MOST_THINGS = 9


def scene_of(occasion: Occasion, things: Sequence[Thing]) -> Scene:
    return layout(occasion.rng, things, picture_size(occasion.rng))


def several(occasion: Occasion, least: int = 1) -> int:
    """How many things, fewer more often than many."""
    return max(least, min(occasion.rng.randint(1, MOST_THINGS), occasion.rng.randint(1, MOST_THINGS)))


def ask_shape(occasion: Occasion) -> Item:
    rng = occasion.rng
    thing = Thing(occasion.deal("shape", SHAPES), rng.choice(list(COLOURS)))
    if occasion.deal("lone", [True, False, False, False]):
        return occasion.item("shape", occasion.say("lone shape"), occasion.word(thing.shape), scene_of(occasion, [thing]))
    things = crowd(rng, Wanted(*thing), 1, several(occasion, 2), avoid=Wanted(colour=thing.colour))
    question = occasion.say("shape", colour=occasion.word(thing.colour))
    return occasion.item("shape", question, occasion.word(thing.shape), scene_of(occasion, things))


def ask_colour(occasion: Occasion) -> Item:
    rng = occasion.rng
    thing = Thing(rng.choice(list(SHAPES)), occasion.deal("colour", COLOURS))
    if occasion.deal("lone", [True, False, False, False]):
        return occasion.item("colour", occasion.say("lone colour"), occasion.word(thing.colour), scene_of(occasion, [thing]))
    things = crowd(rng, Wanted(*thing), 1, several(occasion, 2), avoid=Wanted(shape=thing.shape))
    question = occasion.say("colour", shape=occasion.word(thing.shape))
    return occasion.item("colour", question, occasion.word(thing.colour), scene_of(occasion, things))


def ask_count(occasion: Occasion) -> Item:
    number = occasion.deal("number", range(MOST_THINGS + 1))
    wanted = some_wanted(occasion.rng, *SOME, *(["all"] if number else []))
    total = number if wanted == Wanted() else occasion.rng.randint(max(1, number), MOST_THINGS)
    question = occasion.say("count", **words(occasion.language, wanted))
    return occasion.item("count", question, str(number), scene_of(occasion, crowd(occasion.rng, wanted, number, total)))


def ask_where(occasion: Occasion) -> Item:
    kind = occasion.deal("kind", ["position"] * 5 + ["seen from"] * 2 + ["either side"] * 2 + ["beside"] * 2)
    return ask_position(occasion) if kind == "position" else ask_relation(occasion, kind)


def ask_position(occasion: Occasion) -> Item:
    rng, answer = occasion.rng, occasion.deal("position", POSITIONS)
    target = distinct(rng, 1)[0]
    wanted = reference(rng, target)
    scene = layout_where(
        rng,
        lambda: crowd(rng, Wanted(*target), 1, rng.randint(1, 5), avoid=wanted),
        lambda scene: scene.position(scene.placed[0]) == answer,
    )
    question = occasion.say("position", **words(occasion.language, wanted))
    return occasion.item("position", question, occasion.word(answer), scene)


def ask_relation(occasion: Occasion, kind: str) -> Item:
    rng, side = occasion.rng, occasion.deal("side", SIDES)
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[side]
    total = rng.choice([2, 2, 3]) if kind == "beside" else rng.choice([2, 2, 3, 4])

    def holds(scene: Scene) -> bool:
        target, other, *rest = scene.placed
        clear = kind != "beside" or all(placed.is_beyond(other, opposite) for placed in rest)
        return clear and target.side_of(other) == side

    scene = layout_where(rng, lambda: distinct(rng, total), holds)
    target, other = (reference(rng, placed.thing) for placed in scene.placed[:2])
    said = words(occasion.language, target) | {"other": words(occasion.language, other)["the"]}
    if kind == "beside":
        beside = {"beside": BESIDE[side], "side": occasion.word(side)}
        return occasion.item("shape", occasion.say(kind, **said, **beside), occasion.word(scene.placed[0].thing.shape), scene)
    if kind == "either side":
        kind = "left or right" if side in ("left", "right") else "above or below"
    return occasion.item("side", occasion.say(kind, **said), occasion.word(side), scene)


def stands_out(scene: Scene, largest: bool) -> bool:
    """Whether the first thing is larger, or smaller, than all others."""
    first, *rest = scene.placed
    return all(first.is_larger(other) if largest else other.is_larger(first) for other in rest)


def uneven(occasion: Occasion, most_things: int, largest: bool) -> Scene:
    """Different things, the first larger or smaller than all others."""
    rng, shape = occasion.rng, occasion.deal("uneven", SHAPES)
    for _ in range(ATTEMPTS):
        things = distinct(rng, rng.randint(2, most_things), shape)
        small = [least_scale(thing.shape) * rng.uniform(1, 1.15) for thing in things]
        large = [rng.uniform(1.6, 2.6) * (max(small[1:]) if largest else small[0]) for _ in things]
        scales = [large[0], *small[1:]] if largest else [small[0], *large[1:]]
        scene = layout(rng, things, picture_size(rng), scales)
        if stands_out(scene, largest):
            return scene
    raise RuntimeError(f"no scene has an uneven {shape} in {ATTEMPTS} attempts")


def ask_size(occasion: Occasion) -> Item:
    rng, language = occasion.rng, occasion.language
    kind = occasion.deal("kind", ["larger", "smaller", "largest", "smallest"])
    pair = kind in MORE["en"]
    scene = uneven(occasion, 3 if pair else 5, kind in ("larger", "largest"))
    thing, other = (placed.thing for placed in scene.placed[:2])
    if not pair:
        question = occasion.say("largest", most=rng.choice(MOST[language][kind]))
        return occasion.item("shape", question, occasion.word(thing.shape), scene)
    both = rng.random() < 0.35
    asked = [Wanted(named.shape, named.colour if both else None) for named in (thing, other)]
    rng.shuffle(asked)
    first, second = (one(language, wanted) for wanted in asked)
    question = occasion.say("larger", the=first, one=first, other=second, more=rng.choice(MORE[language][kind]))
    return occasion.item("shape", question, occasion.word(thing.shape), scene)


def yes_no(occasion: Occasion, yes: bool, kind: str) -> str:
    if occasion.language == "en":
        return "yes" if yes else "no"
    return {"presence": ("没有", "有")}.get(kind, ("不是", "是"))[yes]


def ask_yes_no(occasion: Occasion) -> Item:
    rng, yes = occasion.rng, occasion.deal("yes", [True, False])
    kind = occasion.deal("kind", ["presence", "presence", "presence", "more than", "check"])
    if kind == "check":
        things = crowd(rng, some_wanted(rng, "shape"), 1, several(occasion))
        colour = rng.choice([c for c in COLOURS if (c == things[0].colour) == yes])
        question = occasion.say(kind, shape=occasion.word(things[0].shape), colour=occasion.word(colour))
    elif kind == "presence":
        wanted = some_wanted(rng, *SOME)
        number = rng.choice([1, 1, 1, 2, 3]) if yes else 0
        things = crowd(rng, wanted, number, several(occasion, max(1, number)))
        question = occasion.say(kind, **words(occasion.language, wanted))
    else:
        wanted, limit = some_wanted(rng, *SOME, "all"), rng.randint(2, 5)
        number = limit + rng.randint(1, 3) if yes else max(int(wanted == Wanted()), limit - rng.randint(0, 2))
        total = number if wanted == Wanted() else rng.randint(max(1, number), MOST_THINGS)
        things = crowd(rng, wanted, number, total)
        question = occasion.say(kind, number=NUMBERS[occasion.language][limit], **words(occasion.language, wanted))
    return occasion.item("yes_no", question, yes_no(occasion, yes, kind), scene_of(occasion, things))


def ask_number(occasion: Occasion) -> Item:
    digits = occasion.deal("digits", range(1, 5))
    number = str(occasion.rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    return occasion.item("number", occasion.say("number"), number, write(occasion.rng, number))


def ask_word(occasion: Occasion) -> Item:
    word = styled(occasion.rng, occasion.rng.choice(WORDS))
    return occasion.item("word", occasion.say("word"), word, write(occasion.rng, word))


def ask_chart_best(occasion: Occasion) -> Item:
    rng, kind = occasion.rng, occasion.deal("kind", ["tallest", "shortest"])
    best = occasion.deal("bar", [(total, i) for total in range(2, 6) for i in range(total)])
    limit = rng.randint(2, 10) if kind == "tallest" else rng.randint(1, 9)
    others = range(1, limit) if kind == "tallest" else range(limit + 1, 11)
    heights = [limit if i == best[1] else rng.choice(others) for i in range(best[0])]
    question = occasion.say("tallest", most=rng.choice(TALLEST[occasion.language][kind]))
    return occasion.item("letter", question, LABELS[best[1]], draw_chart(rng, heights))


def ask_chart_height(occasion: Occasion) -> Item:
    rng, height = occasion.rng, occasion.deal("height", range(1, 11))
    total, asked = occasion.deal("bar", [(total, i) for total in range(2, 6) for i in range(total)])
    heights = [height if i == asked else rng.randint(1, 10) for i in range(total)]
    question = occasion.say("height", label=LABELS[asked])
    return occasion.item("count", question, str(height), draw_chart(rng, heights))


def described(language: str, things: Sequence[Thing]) -> str:
    """One sentence that names every thing."""
    parts = []
    for thing, number in Counter(things).items():
        wanted = Wanted(*thing)
        if language == "zh":
            parts.append(f"{NUMBERS['zh'][number]}个{one('zh', wanted)}")
        else:
            parts.append(with_article(one("en", wanted)) if number == 1 else f"{NUMBERS['en'][number]} {plural(wanted)}")
    *most, last = parts
    if language == "zh":
        return "图中有" + "、".join(most) + ("和" if most else "") + last + "。"
    return ", ".join(most).capitalize() + (f" and {last}." if most else f"{last.capitalize()}.")


def ask_describe(occasion: Occasion) -> Item:
    rng = occasion.rng
    things = crowd(rng, Wanted(), total := occasion.deal("total", range(1, 5)), total)
    return occasion.item(
        "description", occasion.say("describe"), described(occasion.language, things), scene_of(occasion, things)
    )


def boxed(scene: Scene, placed: Placed, name: str) -> str:
    """The form that a box is given in, in thousandths of width and height."""
    sides = (*scene.size, *scene.size)
    numbers = [max(0, min(1000, round(1000 * edge / side))) for edge, side in zip(placed.box, sides, strict=True)]
    return f"<ref>{name}</ref><box>[{numbers}]</box>"


def ask_box(occasion: Occasion) -> Item:
    rng = occasion.rng
    target = distinct(rng, 1)[0]
    wanted = reference(rng, target)
    scene = scene_of(occasion, crowd(rng, Wanted(*target), 1, rng.randint(1, 5), avoid=wanted))
    answer = boxed(scene, scene.placed[0], one(occasion.language, wanted))
    return occasion.item("box", occasion.say("box", **words(occasion.language, wanted)), answer, scene)
