"""Several JSON schemas that must hold at once, as one: allOf, and keywords beside $ref, anyOf and the like.

xgrammar has no such thing. Patterns and formats that come together are kept as tuples, which no JSON document has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from vlserve.structured import formats, regex

Schema = Mapping[str, Any]


class SchemaError(ValueError):
    """A schema that cannot be used; the message names the keyword and its place."""


class NothingFits(SchemaError):
    """A schema that no value satisfies."""


TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_TOGETHER: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(["minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"], max),
    **dict.fromkeys(["maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"], min),
    "multipleOf": lambda a, b: math.lcm(a, b) if isinstance(a, int) and isinstance(b, int) else None,
    "pattern": lambda a, b: (*as_tuple(a), *as_tuple(b)),
    "format": lambda a, b: (*as_tuple(a), *as_tuple(b)),
    "required": lambda a, b: [*a, *b],
}
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties")


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def merge(a: Schema, b: Schema, place: str) -> dict[str, Any]:
    """Keywords without $ref, anyOf, oneOf and allOf that ask for what both do; SchemaError when that cannot be said."""
    both = {**a, **b}
    for key in set(a) & set(b) - set(_OF_OBJECTS):
        both[key] = _together(key, a[key], b[key], place)
    values = [constants(schema, place) for schema in (a, b)]
    if values[0] is not None and values[1] is not None:
        both.pop("const", None)
        others = set(map(_identity, values[1]))
        both["enum"] = [x for x in values[0] if _identity(x) in others]
        if not both["enum"]:
            raise NothingFits(f"the constants that are asked for exclude each other (at {place})")
    if any(key in schema for schema in (a, b) for key in _OF_OBJECTS):
        for key in _OF_OBJECTS:
            both.pop(key, None)
        both |= _objects(a, b, place)
    return both


def _together(key: str, a: Any, b: Any, place: str) -> Any:
    if key == "type":
        types = [t for t in of_types(a) if t in of_types(b) or (t == "integer" and "number" in of_types(b))]
        types += ["integer"] * ("integer" in of_types(b) and "number" in of_types(a) and "integer" not in of_types(a))
        if not types:
            raise NothingFits(f"the types {a!r} and {b!r} exclude each other (at {place})")
        return types
    if a == b or key in ("const", "enum"):
        return a
    if key in ("items", "unevaluatedItems", "propertyNames"):
        return {"allOf": [a, b]}
    if key == "prefixItems" and isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [{"allOf": [x, y]} for x, y in zip(a, b, strict=True)]
    try:
        together = _TOGETHER[key](a, b)
    except (KeyError, TypeError):
        together = None
    if together is None:
        raise SchemaError(f"{key} is asked for twice in ways that cannot be put together; give it once (at {place})")
    return together


def _objects(a: Schema, b: Schema, place: str) -> dict[str, Any]:
    """Properties of two schemas: what one of them does not name is what the other says of additional ones."""
    patterns = [schema.get("patternProperties", {}) for schema in (a, b)]
    named = [schema.get("properties", {}) for schema in (a, b)]
    rest = [schema.get("additionalProperties", True) for schema in (a, b)]
    if not all(isinstance(part, Mapping) for part in (*patterns, *named)):
        raise SchemaError(f"properties and patternProperties must be objects (at {place})")
    for i in (0, 1):
        if patterns[i] and (named[1 - i] or "additionalProperties" in (a, b)[1 - i] or patterns[1 - i]):
            raise SchemaError(f"patternProperties cannot be put together with other properties; write it once (at {place})")
    found: dict[str, Any] = {}
    for name in dict.fromkeys([*named[0], *named[1]]):
        parts = [properties.get(name, other) for properties, other in zip(named, rest, strict=True)]
        found[name] = _all_of(*parts)
    result: dict[str, Any] = {"properties": found} if named[0] or named[1] else {}
    if patterns[0] or patterns[1]:
        result["patternProperties"] = patterns[0] or patterns[1]
    if "additionalProperties" in a or "additionalProperties" in b:
        result["additionalProperties"] = _all_of(*rest)
    return result


def _all_of(a: Any, b: Any) -> Any:
    if False in (a, b):
        return False
    if a is True or b is True:
        return b if a is True else a
    return a if a == b else {"allOf": [a, b]}


def of_types(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def constants(schema: Schema, place: str = "#") -> list[Any] | None:
    """The values of const or enum."""
    values = schema.get("enum")
    if values is not None and (not isinstance(values, list) or not values):
        raise SchemaError(f"enum must be a list with values (at {place})")
    if "const" not in schema:
        return values
    if values is not None and not any(equal(schema["const"], value) for value in values):
        raise NothingFits(f"const is not one of enum's values (at {place})")
    return [schema["const"]]


def fits(value: Any, schema: Schema, place: str, budget: regex.Budget) -> bool:
    """Whether a constant satisfies the keywords beside it; SchemaError when that is not known here."""
    types = of_types(schema["type"]) if "type" in schema else None
    if types is not None and not any(has_type(value, type) for type in types):
        return False
    if isinstance(value, str):
        return _text_fits(value, schema, place, budget)
    if isinstance(value, (list, Mapping)):
        beside = sorted(set(schema) - {"const", "enum", "type", "minimum", "maximum", "minLength", "maxLength"})
        if beside:
            raise SchemaError(f"values that are lists or objects cannot be combined with {beside[0]}; leave it out (at {place})")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        more, less = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
        step = schema.get("multipleOf", 1) if "multipleOf" in schema else None
        return bool(low <= value <= high and more < value < less and (step is None or value % step == 0))
    return True


def _text_fits(value: str, schema: Schema, place: str, budget: regex.Budget) -> bool:
    names = [formats.known(name, place) for name in as_tuple(schema.get("format", ()))]
    patterns = [*as_tuple(schema.get("pattern", ())), *(formats.pattern_of(name) for name in names if name is not None)]
    try:
        found = all(regex.finds(pattern, value, budget) for pattern in patterns)
    except ValueError as error:
        raise SchemaError(f"the pattern beside a constant cannot be used: {error} (at {place})") from None
    return found and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))


def equal(a: Any, b: Any) -> bool:
    return bool(_identity(a) == _identity(b))


def _identity(value: Any) -> Hashable:
    """The same for JSON values that are equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, list):
        return ("list", *map(_identity, value))
    if isinstance(value, Mapping):
        return ("object", frozenset((key, _identity(inner)) for key, inner in value.items()))
    return ("bool", value) if isinstance(value, bool) else value


def has_type(value: Any, type: str) -> bool:
    if type == "integer":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == math.floor(value)
    classes: dict[str, Any] = {"number": (int, float), "string": str, "array": list, "object": Mapping, "boolean": bool}
    if type == "null":
        return value is None
    return isinstance(value, classes[type]) and (type == "boolean" or not isinstance(value, bool))


def all_apart(arms: Sequence[Schema], resolved: Callable[[Any], Schema]) -> bool:
    """Whether what is written for one of them never satisfies another; `resolved` follows references."""
    pairs = [(a, b) for i, a in enumerate(arms) for b in arms[:i]]
    return all(_disjoint(a, b, resolved) or (_lacks(a, b) and _lacks(b, a)) for a, b in pairs)


def _disjoint(a: Schema, b: Schema, resolved: Callable[[Any], Schema]) -> bool:
    """No value fits both, as far as types, constants and objects' required properties say."""
    values_a, values_b = constants(a), constants(b)
    if values_a is not None and values_b is not None:
        return set(map(_identity, values_a)).isdisjoint(map(_identity, values_b))
    kinds_a, kinds_b = _kinds(a), _kinds(b)
    if kinds_a is not None and kinds_b is not None and not kinds_a & kinds_b:
        return True
    if not (_writes_objects(a) and _writes_objects(b)):
        return False
    for one, other in ((a, b), (b, a)):
        is_closed = other.get("additionalProperties") is False and "patternProperties" not in other
        if is_closed and set(one.get("required", ())) - set(other.get("properties", {})):
            return True
    for name in set(a.get("required", ())) & set(b.get("required", ())):
        inside = [resolved(schema.get("properties", {}).get(name, {})) for schema in (a, b)]
        if _disjoint(inside[0], inside[1], resolved):
            return True
    return False


def _lacks(a: Schema, b: Schema) -> bool:
    """Objects written for `a` lack a property that `b` requires, since they are closed."""
    is_open = a.get("additionalProperties", a.get("unevaluatedProperties", False)) is not False
    named = {*a.get("properties", {}), *a.get("required", ())}
    if is_open or not named or {"patternProperties", "propertyNames"} & set(a) or not _writes_objects(a):
        return False
    return bool(set(b.get("required", ())) - named)


def _writes_objects(schema: Schema) -> bool:
    """Whether nothing else is written for it; without a type, what its keywords speak of is."""
    if constants(schema) is not None or "type" in schema:
        return _kinds(schema) == {"object"}
    return bool(schema) and all("ropert" in key or key == "required" for key in schema)


def _kinds(schema: Schema) -> set[str] | None:
    """Types, with integers among the numbers; None when any may come."""
    values = constants(schema)
    if values is not None:
        return {next(type for type in TYPES if type != "integer" and has_type(value, type)) for value in values}
    if "type" not in schema:
        return None
    return {"number" if type == "integer" else type for type in of_types(schema["type"])}
