"""The part of JSON Schema that xgrammar turns into a grammar exactly, and a schema rewritten as it reads it best.

xgrammar passes over keywords that it does not know, and over some combinations. Here they are refused by name and
place, so that an answer that is complete is valid. Objects are closed: properties that the schema does not name are
written only where additionalProperties asks for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from vlserve.structured import regex

MAX_DEPTH, MAX_SUBSCHEMAS, MAX_COUNTED_PROPERTIES, MAX_ITEMS, MAX_LENGTH = 32, 512, 32, 10_000, 65_536
MAX_MULTIPLE, MAX_MULTIPLE_RANGE = 1024, 10_000

Schema = Mapping[str, Any]

_ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$schema",
        "$id",
        "$comment",
        "discriminator",
        "contentEncoding",
        "contentMediaType",
        "$defs",
        "definitions",
    ]
)
_KEYWORDS: dict[str, frozenset[str]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "array": frozenset(["items", "prefixItems", "unevaluatedItems", "minItems", "maxItems"]),
    "object": frozenset(
        [
            "properties",
            "required",
            "patternProperties",
            "propertyNames",
            "additionalProperties",
            "unevaluatedProperties",
            "minProperties",
            "maxProperties",
        ]
    ),
}
_TYPED = frozenset().union(*_KEYWORDS.values())

_DAY = r"(\d{4}-(0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|\d{4}-(0[469]|11)-(0[1-9]|[12]\d|30)|\d{4}-02-(0[1-9]|1\d|2[0-8])"
_LEAP_DAY = r"|(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_FORMATS: dict[str, str | None] = {  # None: xgrammar's own
    "date": f"^{_DAY}{_LEAP_DAY}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DAY}{_LEAP_DAY}T{_TIME}$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
    "email": rf"^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_LABEL}(\.{_LABEL})+$",
    "hostname": rf"^{_LABEL}(\.{_LABEL})*$",
    "uuid": None,
    "duration": None,
    "ipv6": None,
    "uri": None,
}


class SchemaError(ValueError):
    """A schema that cannot be used; the message names the keyword and its place."""


def read_schema(text: str) -> str:
    """A JSON schema as xgrammar is to read it; raises SchemaError."""
    try:
        root = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise SchemaError("the schema is not valid JSON") from None
    return json.dumps(rewrite_schema(root, regex.Budget()), ensure_ascii=False)


def rewrite_schema(root: Any, budget: regex.Budget) -> Any:
    """As `read_schema`, for a schema that is part of something else."""
    reader = _Reader(root, budget)
    schema = reader.schema(root, "#", 0)
    return {**schema, "$defs": reader.definitions} if reader.definitions else schema


class _Reader:
    """Walks a schema once; what references point at becomes a definition of its own."""

    def __init__(self, root: Any, budget: regex.Budget) -> None:
        self.definitions: dict[str, Any] = {}
        self._root, self._budget = root, budget
        self._names: dict[str, str] = {"#": "#"}
        self._num_subschemas = 0

    def schema(self, schema: Any, place: str, depth: int) -> Any:
        self._num_subschemas += 1
        if depth > MAX_DEPTH or self._num_subschemas > MAX_SUBSCHEMAS:
            raise SchemaError(f"the schema is too large: {MAX_SUBSCHEMAS} parts and a depth of {MAX_DEPTH} are allowed")
        if schema is True:
            return {}
        if not isinstance(schema, Mapping):
            what = "allows nothing" if schema is False else "is neither an object nor true"
            raise SchemaError(f"the schema at {place} {what}")
        self._check_known(schema, place)
        for keyword, read in (
            ("$ref", self._reference),
            ("const", self._values),
            ("enum", self._values),
            ("anyOf", self._alternatives),
            ("oneOf", self._alternatives),
            ("allOf", self._only_one),
        ):
            if keyword in schema:
                beside = sorted(set(schema) - _ANNOTATIONS - {keyword, "type"} - _extensions(schema))
                if beside or ("type" in schema and keyword not in ("const", "enum")):
                    raise SchemaError(f"{keyword} cannot be combined with {(beside or ['type'])[0]} (at {place})")
                return read(schema, keyword, place, depth)
        return self._typed(schema, place, depth)

    def _check_known(self, schema: Schema, place: str) -> None:
        known = _ANNOTATIONS | _TYPED | {"type", "$ref", "const", "enum", "anyOf", "oneOf", "allOf"} | _extensions(schema)
        neutral = {"uniqueItems": False, "nullable": False}
        for keyword in schema:
            if keyword not in known and schema[keyword] is not neutral.get(keyword, ...):
                raise SchemaError(f"the keyword {keyword!r} is not supported (at {place})")
        if "$id" in schema and place != "#":
            raise SchemaError(f"$id is supported at the root only (at {place})")

    def _reference(self, schema: Schema, keyword: str, place: str, depth: int) -> Any:
        target = schema["$ref"]
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise SchemaError(f"$ref is {target!r}; only references within the schema (#/...) are supported (at {place})")
        if target not in self._names:
            self._names[target] = name = f"d{len(self._names)}"
            self.definitions[name] = self.schema(self._find(target, place), target, depth + 1)
        name = self._names[target]
        return {"$ref": "#" if name == "#" else f"#/$defs/{name}"}

    def _find(self, target: str, place: str) -> Any:
        found = self._root
        for part in target.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping) and part in found:
                found = found[part]
            else:
                raise SchemaError(f"$ref {target!r} points at nothing (at {place})")
        return found

    def _values(self, schema: Schema, keyword: str, place: str, depth: int) -> Any:
        values = [schema["const"]] if keyword == "const" else schema["enum"]
        if not isinstance(values, list) or not values:
            raise SchemaError(f"enum must be a list with values (at {place})")
        types = _types(schema, place)
        for value in values:
            _check_value(value, place)
            if types is not None and not any(_has_type(value, type) for type in types):
                raise SchemaError(f"{keyword} has a value that is not of its type (at {place})")
        return {"enum": values}

    def _alternatives(self, schema: Schema, keyword: str, place: str, depth: int) -> Any:
        arms = schema[keyword]
        if not isinstance(arms, list) or not arms:
            raise SchemaError(f"{keyword} must be a list of schemas (at {place})")
        read = [self.schema(arm, f"{place}/{keyword}/{i}", depth + 1) for i, arm in enumerate(arms)]
        if keyword == "oneOf":
            resolved = [self._resolve(arm) for arm in arms]
            for i, arm in enumerate(resolved):
                if not all(self._are_disjoint(arm, other) for other in resolved[:i]):
                    raise SchemaError(
                        f"oneOf has alternatives that may both fit; give them different types or a required property "
                        f"with different constants, or use anyOf (at {place})"
                    )
        return {"anyOf": read}

    def _only_one(self, schema: Schema, keyword: str, place: str, depth: int) -> Any:
        arms = schema["allOf"]
        if not isinstance(arms, list) or len(arms) != 1:
            raise SchemaError(f"allOf is supported with one schema only (at {place})")
        return self.schema(arms[0], f"{place}/allOf/0", depth + 1)

    def _resolve(self, schema: Any) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._find(schema["$ref"], "oneOf")
        return schema

    def _are_disjoint(self, a: Any, b: Any) -> bool:
        """No value fits both, as far as types, constants and required constants of objects say."""
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            return False
        kinds_a, kinds_b = _kinds(a), _kinds(b)
        if kinds_a is not None and kinds_b is not None and not kinds_a & kinds_b:
            return True
        values_a, values_b = _constants(a), _constants(b)
        if values_a is not None and values_b is not None:
            return not any(_equal(x, y) for x in values_a for y in values_b)
        if kinds_a != {"object"} or kinds_b != {"object"}:
            return False
        for name in set(a.get("required", ())) & set(b.get("required", ())):
            arms = [self._resolve(s.get("properties", {}).get(name)) for s in (a, b)]
            if self._are_disjoint(*arms):
                return True
        return False

    def _typed(self, schema: Schema, place: str, depth: int) -> Any:
        given = sorted(set(schema) & _TYPED)
        types = _types(schema, place)
        if types is None:
            types = [name for name in ("object", "array") if given and set(given) <= _KEYWORDS[name]]
            if given and not types:
                raise SchemaError(f"{given[0]} needs a type beside it (at {place})")
            if not given:
                return {}
        read: dict[str, Callable[[Schema, str, int], dict[str, Any]]] = {
            "integer": self._integer,
            "number": self._number,
            "string": self._string,
            "array": self._array,
            "object": self._object,
        }
        arms = [{"type": type, **(read[type](schema, place, depth) if type in read else {})} for type in types]
        return arms[0] if len(arms) == 1 else {"anyOf": arms}

    def _integer(self, schema: Schema, place: str, depth: int) -> dict[str, Any]:
        kept = self._number(schema, place, depth)
        step = schema.get("multipleOf")
        if step is None:
            return kept
        _check_count(step, "multipleOf", place, MAX_MULTIPLE, least=1)
        low = [schema[key] for key in ("minimum", "exclusiveMinimum") if key in schema]
        high = [schema[key] for key in ("maximum", "exclusiveMaximum") if key in schema]
        if (low or high) and not (low and high and min(high) - max(low) < MAX_MULTIPLE_RANGE):
            raise SchemaError(f"multipleOf with a range needs both its ends, less than {MAX_MULTIPLE_RANGE} apart (at {place})")
        self._take(("multipleOf", step, *low, *high), step // 8, place)
        return {**kept, "multipleOf": int(step)}

    def _number(self, schema: Schema, place: str, depth: int) -> dict[str, Any]:
        types = _types(schema, place) or []
        if "number" in types and "multipleOf" in schema:
            raise SchemaError(f"multipleOf is supported for integers only (at {place})")
        if "format" in schema and "string" not in types:
            raise SchemaError(f"format is supported for strings only (at {place})")
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            value = schema.get(key, 0)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 2**53:
                raise SchemaError(f"{key} must be a number between -2^53 and 2^53 (at {place})")
            if value and abs(value) < 1e-5:
                raise SchemaError(f"{key} is {value}, finer than five places after the point (at {place})")
        return {key: schema[key] for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if key in schema}

    def _string(self, schema: Schema, place: str, depth: int) -> dict[str, Any]:
        given = [key for key in ("format", "pattern", "minLength", "maxLength") if key in schema]
        if len(given) > 1 and given[0] in ("format", "pattern"):
            raise SchemaError(f"{given[0]} cannot be combined with {given[1]} (at {place})")
        if "format" in schema:
            name = schema["format"]
            if name not in _FORMATS:
                raise SchemaError(f"the format {name!r} is not supported; formats: {', '.join(_FORMATS)} (at {place})")
            pattern = _FORMATS[name]
            return {"format": name} if pattern is None else {"pattern": self._pattern(pattern, place)}
        if "pattern" in schema:
            return {"pattern": self._pattern(schema["pattern"], place)}
        for key in given:
            _check_count(schema[key], key, place, MAX_LENGTH)
        kept = {key: int(schema[key]) for key in given}
        self._take(tuple(kept.items()), min(max(kept.values(), default=0), regex.UNROLLED), place)
        return kept

    def _array(self, schema: Schema, place: str, depth: int) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key in ("minItems", "maxItems"):
            if key in schema:
                _check_count(schema[key], key, place, MAX_ITEMS)
                kept[key] = int(schema[key])
        if "prefixItems" in schema:
            if not isinstance(schema["prefixItems"], list) or not schema["prefixItems"]:
                raise SchemaError(f"prefixItems must be a list of schemas (at {place})")
            kept["prefixItems"] = [
                self.schema(item, f"{place}/prefixItems/{i}", depth + 1) for i, item in enumerate(schema["prefixItems"])
            ]
        rest = [key for key in ("items", "unevaluatedItems") if key in schema]
        if len(rest) == 2:
            raise SchemaError(f"unevaluatedItems has no meaning beside items (at {place})")
        value = schema[rest[0]] if rest else "prefixItems" not in schema
        kept["items"] = value if value is False else self.schema(value, f"{place}/{rest[0] if rest else 'items'}", depth + 1)
        return kept

    def _object(self, schema: Schema, place: str, depth: int) -> dict[str, Any]:
        properties = _dictionary(schema, "properties", place)
        patterns = _dictionary(schema, "patternProperties", place)
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise SchemaError(f"required must be a list of names (at {place})")
        unnamed = [name for name in required if name not in properties]
        if unnamed:
            raise SchemaError(f"required names {unnamed[0]!r}, which properties does not have (at {place})")
        rest = [key for key in ("additionalProperties", "unevaluatedProperties") if key in schema]
        if len(rest) == 2:
            raise SchemaError(f"unevaluatedProperties has no meaning beside additionalProperties (at {place})")
        only = [key for key in ("patternProperties", "propertyNames") if key in schema]
        others = [key for key in ("properties", *only, *rest) if key in schema and key not in only[:1]]
        others = [key for key in others if not (key in rest and only[:1] == ["patternProperties"] and schema[key] is False)]
        if only and others:
            raise SchemaError(f"{only[0]} cannot be combined with {others[0]} (at {place})")
        kept: dict[str, Any] = {}
        if properties:
            kept["properties"] = {
                name: self.schema(value, f"{place}/properties/{name}", depth + 1) for name, value in properties.items()
            }
            kept["required"] = list(dict.fromkeys(required))
        if patterns:
            if len(patterns) > 1:
                raise SchemaError(f"patternProperties is supported with one pattern only (at {place})")
            kept["patternProperties"] = {
                self._pattern(name, place): self.schema(value, f"{place}/patternProperties/{name}", depth + 1)
                for name, value in patterns.items()
            }
        if "propertyNames" in schema:
            names = schema["propertyNames"]
            kept["propertyNames"] = self.schema(
                {"type": "string", **names} if isinstance(names, Mapping) and "$ref" not in names else names,
                f"{place}/propertyNames",
                depth + 1,
            )
        if rest:
            value = schema[rest[0]]
            kept["additionalProperties"] = value if value is False else self.schema(value, f"{place}/{rest[0]}", depth + 1)
        elif not properties and not only and "properties" not in schema:
            kept["additionalProperties"] = {}
        is_open = bool(only) or kept.get("additionalProperties", False) is not False
        self._count_properties(schema, kept, is_open, place)
        return kept

    def _count_properties(self, schema: Schema, kept: dict[str, Any], is_open: bool, place: str) -> None:
        for key in ("minProperties", "maxProperties"):
            if key in schema:
                _check_count(schema[key], key, place, MAX_ITEMS)
                kept[key] = int(schema[key])
                if len(kept.get("properties", ())) > MAX_COUNTED_PROPERTIES:
                    raise SchemaError(f"{key} is supported with at most {MAX_COUNTED_PROPERTIES} properties (at {place})")
        if is_open and kept.get("minProperties", 0) > max(1, len(kept.get("required", ()))):
            # a name that comes twice is counted twice
            raise SchemaError(f"minProperties above 1 is supported with properties that are all named (at {place})")

    def _pattern(self, given: Any, place: str) -> str:
        if not isinstance(given, str):
            raise SchemaError(f"pattern must be a text (at {place})")
        try:
            return f"^{regex.rewrite(given, self._budget, in_json=True)}$"
        except ValueError as error:
            raise SchemaError(f"the pattern {given[:100]!r} cannot be used: {error} (at {place})") from None

    def _take(self, part: Any, num_states: int, place: str) -> None:
        try:
            self._budget.take(part, num_states)
        except ValueError as error:
            raise SchemaError(f"the schema cannot be used: {error} (at {place})") from None


def _extensions(schema: Schema) -> set[str]:
    return {key for key in schema if key.startswith("x-")}


def _types(schema: Schema, place: str) -> list[str] | None:
    """The types in their order; None when `type` is not given."""
    if "type" not in schema:
        return None
    given = schema["type"]
    types = [given] if isinstance(given, str) else given
    if not isinstance(types, list) or not types or not all(isinstance(t, str) and t in _KEYWORDS for t in types):
        raise SchemaError(f"type is {given!r}; expected {', '.join(_KEYWORDS)} or a list of these (at {place})")
    return list(dict.fromkeys(types))


def _dictionary(schema: Schema, key: str, place: str) -> Mapping[str, Any]:
    value = schema.get(key, {})
    if not isinstance(value, Mapping):
        raise SchemaError(f"{key} must be an object (at {place})")
    return value


def _check_count(value: Any, key: str, place: str, most: int, *, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or not least <= value <= most:
        raise SchemaError(f"{key} is {value!r}; expected a whole number from {least} to {most} (at {place})")


def _check_value(value: Any, place: str) -> None:
    if isinstance(value, list):
        for item in value:
            _check_value(item, place)
    elif isinstance(value, Mapping):
        for item in value.values():
            _check_value(item, place)
    elif isinstance(value, int) and abs(value) > 2**53:
        raise SchemaError(f"{value} is more than a JSON number holds exactly (at {place})")


def _kinds(schema: Schema) -> set[str] | None:
    """Types, with integers among the numbers; None when any may come."""
    values = _constants(schema)
    if values is not None:
        return {next(type for type in _KEYWORDS if type != "integer" and _has_type(v, type)) for v in values}
    types = _types(schema, "oneOf")
    return None if types is None else {"number" if type == "integer" else type for type in types}


def _constants(schema: Schema) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _has_type(value: Any, type: str) -> bool:
    if type == "integer":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == math.floor(value)
    classes: dict[str, Any] = {"number": (int, float), "string": str, "array": list, "object": Mapping, "boolean": bool}
    if type == "null":
        return value is None
    return isinstance(value, classes[type]) and (type == "boolean" or not isinstance(value, bool))


def _no_constant(name: str) -> None:
    raise ValueError(name)
