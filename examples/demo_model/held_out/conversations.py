"""Held-out questions beyond one plain one: several pictures, two turns, answers in JSON, and no picture at all."""

import json

from held_out.occasion import Occasion
from held_out.phrasings import MOST, ways
from held_out.scenes import SOME, scene_of, several, uneven, yes_no
from held_out.shapes import Scene, layout_where
from held_out.world import COLOURS, POSITIONS, SHAPES, Item, Thing, Wanted, crowd, distinct, reference, some_wanted, words

PICTURES = {"en": ("picture 1", "picture 2", "picture 3"), "zh": ("第一张", "第二张", "第三张")}
ABOUT_ANSWERS = {
    "identity": {"en": "I am demo, the small model in the box of vlserve.", "zh": "我是 demo，vlserve 自带的小模型。"},
    "abilities": {
        "en": "I can name shapes and colours, count them, read numbers and words, and read bar charts.",
        "zh": "我能说出图片中的形状和颜色，数数量，读数字和单词，看柱状图。",
    },
    "beyond": {
        "en": "I can only talk about pictures of shapes, numbers, words and charts.",
        "zh": "我只能谈论有形状、数字、单词和图表的图片。",
    },
}


def ask_compare(occasion: Occasion) -> Item:
    rng, kind = occasion.rng, occasion.deal("kind", ["more", "has", "has", "most", "same shape", "same colour"])
    if kind.startswith("same"):
        return ask_same(occasion, kind)
    total, best = occasion.deal("picture", [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
    if kind == "more":
        total, best = 2, occasion.deal("of two", [0, 1])
    wanted = Wanted() if kind == "more" else some_wanted(rng, *SOME)
    least = 1 if kind == "more" else 0  # no picture is empty
    most = {"has": rng.randint(1, 3), "more": rng.randint(2, 6), "most": rng.randint(1, 4)}[kind]
    scenes = []
    for i in range(total):
        number = most if i == best else 0 if kind == "has" else rng.randint(least, most - 1)
        others = 0 if kind == "more" else rng.randint(int(number == 0), 3)
        scenes.append(scene_of(occasion, crowd(rng, wanted, number, number + others)))
    return occasion.item(
        "picture", occasion.say(kind, **words(occasion.language, wanted)), PICTURES[occasion.language][best], *scenes
    )


def ask_same(occasion: Occasion, kind: str) -> Item:
    """About two pictures of one thing each, which may share the other of shape and colour or not."""
    rng, yes = occasion.rng, occasion.deal(kind, [True, False])
    first = distinct(rng, 1)[0]
    alike = rng.random() < 0.4
    shape_alike, colour_alike = (yes, alike) if kind == "same shape" else (alike, yes)
    second = Thing(
        rng.choice([shape for shape in SHAPES if (shape == first.shape) == shape_alike]),
        rng.choice([colour for colour in COLOURS if (colour == first.colour) == colour_alike]),
    )
    scenes = [scene_of(occasion, [thing]) for thing in (first, second)]
    return occasion.item("yes_no", occasion.say(kind), yes_no(occasion, yes, kind), *scenes)


def lies_alone(scene: Scene, side: str) -> bool:
    """Whether the first thing is in that third of the picture, and all others well beyond it."""
    thirds = [3 * placed.centre.real / scene.size[0] for placed in scene.placed]
    first, *rest = thirds if side == "left" else [3 - third for third in thirds]
    apart = all(scene.placed[0].is_beyond(other, side) for other in scene.placed[1:])
    return apart and first < 0.9 and all(third > 1.25 for third in rest)


def ask_follow_up(occasion: Occasion) -> Item:
    kinds = ["side colour", "largest colour", "largest position", "presence colour", "presence position", "any count"]
    first, then = occasion.deal("kind", kinds).split()
    if first == "any":
        return ask_how_many_of_them(occasion)
    scene, question = {"side": on_a_side, "largest": of_a_size, "presence": present}[first](occasion, then)
    target = scene.placed[0]
    answer = target.thing.colour if then == "colour" else scene.position(target)
    assert answer is not None
    return occasion.item(then, (question, occasion.say(f"its {then}")), occasion.word(answer), scene)


def ask_how_many_of_them(occasion: Occasion) -> Item:
    rng = occasion.rng
    wanted, number = some_wanted(rng, *SOME), occasion.deal("number", range(1, 8))
    scene = scene_of(occasion, crowd(rng, wanted, number, rng.randint(number, 9)))
    turns = (occasion.say("any", **words(occasion.language, wanted)), occasion.say("of them"))
    return occasion.item("count", turns, str(number), scene)


def on_a_side(occasion: Occasion, then: str) -> tuple[Scene, str]:
    rng, side = occasion.rng, occasion.deal("side", ["left", "right"])
    total = rng.randint(2, 3)
    scene = layout_where(rng, lambda: distinct(rng, total), lambda scene: lies_alone(scene, side))
    return scene, occasion.say("side", side=side, word=occasion.word(side))


def of_a_size(occasion: Occasion, then: str) -> tuple[Scene, str]:
    rng, most = occasion.rng, occasion.deal("most", MOST["en"])
    scene = uneven(occasion, 4, most == "largest")
    while then == "position" and scene.position(scene.placed[0]) is None:
        scene = uneven(occasion, 4, most == "largest")
    return scene, occasion.say("largest", most=rng.choice(MOST[occasion.language][most]))


def present(occasion: Occasion, then: str) -> tuple[Scene, str]:
    rng, position = occasion.rng, occasion.deal("position", POSITIONS)
    target, total = distinct(rng, 1)[0], rng.randint(1, 5)
    wanted = Wanted(shape=target.shape) if then == "colour" else reference(rng, target)
    scene = layout_where(
        rng,
        lambda: crowd(rng, Wanted(*target), 1, total, avoid=wanted),
        lambda scene: then == "colour" or scene.position(scene.placed[0]) == position,
    )
    return scene, occasion.say("presence", **words(occasion.language, wanted))


def ask_json(occasion: Occasion) -> Item:
    rng, kind = occasion.rng, occasion.deal("kind", ["colour", "shape", "count", "list"])
    target = Thing(occasion.deal("shape", SHAPES), occasion.deal("colour", COLOURS))
    value: object
    if kind == "list":
        things = crowd(rng, Wanted(), total := rng.randint(1, 4), total)
        value = [{"colour": occasion.word(thing.colour), "shape": occasion.word(thing.shape)} for thing in things]
        question = occasion.say("list")
    elif kind == "count":
        wanted, number = some_wanted(rng, *SOME), occasion.deal("number", range(8))
        things = crowd(rng, wanted, number, rng.randint(max(1, number), 9))
        value, question = {"count": number}, occasion.say("count", **words(occasion.language, wanted))
    else:
        by = "shape" if kind == "colour" else "colour"
        pointed = getattr(target, by)
        things = crowd(rng, Wanted(*target), 1, several(occasion), avoid=Wanted(**{by: pointed}))
        value, question = {kind: occasion.word(getattr(target, kind))}, occasion.say(kind, **{by: occasion.word(pointed)})
    if kind != "list":
        question += (" " if occasion.language == "en" else "") + occasion.say("in json")
    return occasion.item("json", question, json.dumps(value, ensure_ascii=False), scene_of(occasion, things))


def ask_about(occasion: Occasion) -> Item:
    kind = occasion.deal("kind", ABOUT_ANSWERS)
    return occasion.item(kind, occasion.rng.choice(ways(kind, occasion.language)), ABOUT_ANSWERS[kind][occasion.language])
