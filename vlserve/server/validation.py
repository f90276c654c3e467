"""A body that does not have its fields' types, told in plain words: pydantic's are for programmers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vlserve.errors import RequestError

EXPECTED = {  # by pydantic's types of errors
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "none_required": "null",
}

LISTS: Mapping[int | str, str] = {"list[str]": "a list of texts", "list[int]": "a list of whole numbers"}  # among other things


def explain(error: ValidationError) -> RequestError:
    """The first wrong field; where it may be one of several things, the one that the value came nearest to."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    places = [_place(e["loc"]) for e in errors]
    field = places[0].partition(".")[0]
    place = max((place for place in places if place.partition(".")[0] == field), key=lambda place: place.count("."))
    found = [e for e, other in zip(errors, places, strict=True) if other == place]
    return RequestError(_message(place, found), param=place)


def _message(place: str, found: Sequence[ErrorDetails]) -> str:
    kind, text = found[0]["type"], found[0]["msg"]
    if kind == "extra_forbidden":
        return f"{place} is not a field of {place.rpartition('.')[0] or 'the body'}; leave it out"
    if kind == "missing":
        return f"{place} is missing"
    expected = dict.fromkeys(filter(None, map(_expected, found)))
    if expected:
        return f"{place}: expected {' or '.join(expected)}"
    return f"{place}: {text.removeprefix('Value error, ')}"


def _expected(error: ErrorDetails) -> str:
    """ "" where it is no matter of the type."""
    _, is_type, text = error["msg"].rpartition("Input should be ")
    return LISTS.get(error["loc"][-1]) or EXPECTED.get(error["type"]) or (text if is_type else "")


def _place(location: Sequence[int | str]) -> str:
    """stop.0 and the like; a union's arms (`list[str]`, `ToolChoice`) are no fields."""
    arms = ("str", "bool", "int", "float")
    fields = [p for p in location if isinstance(p, int) or (p.islower() and "[" not in p and p not in arms)]
    return ".".join(map(str, fields)) or "body"
