"""Marks replies: right is one that is in the question's language, names the answer, and nothing else that could have been one.

Each kind of answer has a function that reads what a reply says; a reply is right when it says what the item's answer says.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from held_out.lexicon import (
    COLOUR_NAMES,
    ENDS,
    FRAME,
    NOT_A_NUMBER,
    NUMBER_NAMES,
    PICTURE_NAMES,
    POSITION_NAMES,
    SHAPE_NAMES,
    SIDE_NAMES,
    Names,
)
from held_out.world import Item

HAN = re.compile(r"[\u4e00-\u9fff]")
LEAST_OVERLAP = 0.5
ZH_PLACE = re.compile(r"[左右]|[上下](?=[面方边部角侧])|(?<=[左右])[上下]|顶|底|中间|中央|中心|正中")
ZH_PLACES = {"左": "left", "右": "right", "上": "top", "顶": "top", "下": "bottom", "底": "bottom"}
ZH_PICTURE = re.compile(r"(?:第|图片?)\s*([一二三123])")
EN_PICTURE = re.compile(
    r"\b(first|second|third|1st|2nd|3rd)\b|\b(?:picture|image)s?\s*(?:no\.|number)?\s*(one|two|three|[123])\b"
)
COMPARISON = {  # what a reply says of another thing: "than the circle", "left of the circle"
    "en": re.compile(r"\b(?:than|of|from|to|above|below)\s+(?:the|a|an)\s+[a-z]+(?:\s+[a-z]+)?"),
    "zh": re.compile(r"比[^，。]*?(?=[大小更])|在[^，。]*?[左右上下][边面方]|^[^，。]*?的[左右上下][边面方](?=[是有])"),
}
SUBJECTS = {
    "en": "shape|colo|count|number|word|chart|bar|picture|image|describ|compar|box|json|read|position|where",
    "zh": "形状|图形|颜色|数量|多少|几个|数字|单词|图表|柱|图片|描述|比较|方框|位置|JSON|json",
}
LIMITS = {
    "en": r"\bonly\b|\bcannot\b|n['’]t\b|\bnot\b|\bunable\b|\bsorry\b|\bjust\b",
    "zh": "只|不能|无法|不会|不知道|抱歉|没法|不了",
}


def found(names: Names, language: str, reply: str) -> list[str]:
    """The named things in their order. In Chinese the longest name counts: a 三角形 is no three."""
    if language == "en":
        return [names.get(word, word) for word in re.findall(r"[a-z]+|\d+", reply.lower()) if word in names or word.isdigit()]
    longest_first = sorted(names, key=len, reverse=True)
    return [names.get(word, word) for word in re.findall("|".join([*map(re.escape, longest_first), r"\d+"]), reply)]


def only(things: list[str]) -> str | None:
    """The thing that is named, once or again, where no other is."""
    return things[0] if len(set(things)) == 1 else None


def read_shape(reply: str, language: str) -> Any:
    return only(found(SHAPE_NAMES[language], language, COMPARISON[language].sub(" ", reply.lower())))


def read_colour(reply: str, language: str) -> Any:
    return only(found(COLOUR_NAMES[language], language, reply))


def read_count(reply: str, language: str) -> Any:
    names = NUMBER_NAMES[language] | ({} if language == "en" else SHAPE_NAMES["zh"] | NOT_A_NUMBER)
    return only([number for number in found(names, language, reply) if number.isdigit()])


def read_position(reply: str, language: str) -> Any:
    """As a set, so that the order of top and left is free; the middle is meant where nothing else is said."""
    names = found(POSITION_NAMES, "en", reply)
    if language == "zh":
        names = [ZH_PLACES.get(place, "centre") for place in ZH_PLACE.findall(reply)]
    return set(names) - {"centre"} or set(names) or None


def read_side(reply: str, language: str) -> Any:
    if language == "zh":
        return read_position(reply, language)
    return only(found(SIDE_NAMES, language, reply))


def read_yes_no(reply: str, language: str) -> Any:
    if language == "zh":
        return "no" if re.search("[没不否无]", reply) else "yes" if re.search("[有是对能]|相同|一样", reply) else None
    said = re.findall(r"\b(?:yes|no|not)\b|n['’]t\b", reply.lower())
    return only(["yes" if word == "yes" else "no" for word in said])


def read_number(reply: str, language: str) -> Any:
    return only(re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3})", "", reply)))


def read_word(reply: str, language: str) -> Any:
    words = [word.strip("'") for word in re.findall(r"[a-z']+", reply.lower().replace("’", "'"))]
    return only([word for word in words if word and word not in FRAME])


def read_letter(reply: str, language: str) -> Any:
    """A label; an A before another word is one only in "A is", "A or B" and the like."""
    return only(re.findall(r"(?<![A-Za-z])(?:[B-E]|A(?!\s+(?!is\b|has\b|or\b|and\b)[a-z]))(?![A-Za-z])", reply))


def read_picture(reply: str, language: str) -> Any:
    reply = reply.lower()
    names = ZH_PICTURE.findall(reply) if language == "zh" else [a or b for a, b in EN_PICTURE.findall(reply)]
    return only([PICTURE_NAMES.get(name, name) for name in names or re.findall(r"\d+", reply)])


def read_description(reply: str, language: str) -> Any:
    """How many of each colour and shape; a number and a colour belong to the shape that comes next."""
    shapes, colours = SHAPE_NAMES[language], COLOUR_NAMES[language]
    named: Counter[tuple[str | None, str]] = Counter()
    number, colour = 1, None
    for name in found(NUMBER_NAMES[language] | ENDS | colours | shapes, language, reply):
        if name in shapes.values():
            named[colour, name] += number
            number, colour = 1, None
        elif name in colours.values():
            colour = name
        elif name.isdigit():
            number = int(name)
        elif name == "end":
            number, colour = 1, None
    return named or None


def canonical(value: Any, language: str) -> Any:
    """A JSON value with one spelling of its keys and values; lists of things in any order. Raises ValueError."""
    if isinstance(value, list):
        return sorted((canonical(entry, language) for entry in value), key=str)
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is neither a list nor an object")
    fields = {}
    for key, entry in value.items():
        name = {"color": "colour"}.get(key.casefold(), key.casefold())
        names = {"colour": COLOUR_NAMES, "shape": SHAPE_NAMES}.get(name, {}).get(language, {})
        fields[name] = int(entry) if name == "count" else names.get(str(entry).casefold(), f"unknown: {entry}")
    return fields


def read_json(reply: str, language: str) -> Any:
    try:
        return canonical(json.loads(re.sub(r"^\s*```(?:json)?|```\s*$", "", reply)), language)
    except (ValueError, TypeError, AttributeError):
        return None


def read_identity(reply: str, language: str) -> Any:
    return bool(re.search(r"\bdemo\b|vlserve", reply, re.IGNORECASE | re.ASCII)) or None


def read_abilities(reply: str, language: str) -> Any:
    return len(set(re.findall(SUBJECTS[language], reply.lower()))) >= 2 or None


def read_beyond(reply: str, language: str) -> Any:
    said = reply.lower()
    return bool(re.search(LIMITS[language], said) and re.search(SUBJECTS[language], said)) or None


def read_box(reply: str) -> tuple[float, ...] | None:
    """The only box, whether its tags came through or not."""
    boxes = re.findall(r"\[\s*\[?([\d\s,.]+)\]", reply)
    if len(boxes) != 1:
        return None
    try:
        left, top, right, bottom = (float(number) for number in boxes[0].split(","))
    except ValueError:
        return None
    return (left, top, right, bottom) if 0 <= left < right <= 1000 and 0 <= top < bottom <= 1000 else None


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The part that two boxes share of all that they cover."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    both = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (both - width * height)


READ: dict[str, Callable[[str, str], Any]] = {
    "shape": read_shape,
    "colour": read_colour,
    "count": read_count,
    "position": read_position,
    "side": read_side,
    "yes_no": read_yes_no,
    "number": read_number,
    "word": read_word,
    "letter": read_letter,
    "picture": read_picture,
    "description": read_description,
    "json": read_json,
    "identity": read_identity,
    "abilities": read_abilities,
    "beyond": read_beyond,
}


def speaks(item: Item, reply: str) -> bool:
    """Whether the reply is in the question's language; figures and letters that are read belong to both."""
    if item.kind == "json":
        return item.language == "zh" or not HAN.search(reply)
    said = re.sub(r"<ref>.*?</ref>|</?[a-z]+>", " ", reply)
    if item.language == "en":
        return not HAN.search(said)
    if item.kind in ("identity", "abilities", "beyond"):
        return bool(HAN.search(said))
    free = {"word": item.answer.lower(), "letter": "[a-e]", "count": "[a-e]"}.get(item.kind, "json")
    return not re.search("[a-z]", re.sub(rf"(?<![a-z])(?:{free})(?![a-z])", " ", said.lower()))


def contradicts(item: Item, reply: str) -> bool:
    """Whether a reply about sizes speaks of large things when asked for small ones, or the other way round."""
    large, small = (
        [bool(re.search(words, text.lower())) for text in (item.turns[-1], reply)] for words in ("larg|big|大", "small|小")
    )
    return item.task == "size" and ((small[1] and not small[0]) or (large[1] and not large[0]))


def is_right(item: Item, reply: str) -> bool:
    if not speaks(item, reply) or contradicts(item, reply):
        return False
    if item.kind == "box":
        wanted, given = read_box(item.answer), read_box(reply)
        return wanted is not None and given is not None and overlap(wanted, given) >= LEAST_OVERLAP
    read = READ[item.kind]
    said = read(reply, item.language)
    return said is not None and said == read(item.answer, item.language)
