"""The part of JSON Schema that xgrammar turns into a grammar exactly, and a schema rewritten as it reads it best.

xgrammar passes over keywords that it does not know, and over some combinations. Here what asserts something and cannot
be held is refused by name and place, so that an answer that is complete is valid. Keywords that JSON Schema does not
define are annotations, as it says. Objects are closed: properties that the schema does not name are written only where
additionalProperties asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from vlserve.structured import formats, regex
from vlserve.structured.conjunction import (
    TYPES,
    NothingFits,
    Schema,
    SchemaError,
    all_apart,
    as_tuple,
    constants,
    fits,
    merge,
    of_types,
)

MAX_DEPTH, MAX_SUBSCHEMAS, MAX_COUNTED_PROPERTIES, MAX_ITEMS, MAX_LENGTH = 32, 512, 32, 10_000, 65_536
MAX_MULTIPLE, MAX_MULTIPLE_RANGE = 1024, 10_000
MAX_COMPARED = 50_000  # properties of oneOf's alternatives, two of them at a time
TOO_LARGE = f"the schema is too large: {MAX_SUBSCHEMAS} parts and a depth of {MAX_DEPTH} are allowed"

_KEYWORDS: dict[str, tuple[str, ...]] = {
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": ("items", "prefixItems", "unevaluatedItems", "minItems", "maxItems", "uniqueItems"),
    "object": (
        *("properties", "required", "patternProperties", "propertyNames", "additionalProperties", "unevaluatedProperties"),
        *("minProperties", "maxProperties"),
    ),
}
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_KNOWN = {key for keys in _KEYWORDS.values() for key in keys} | {"type", "const", "enum", "nullable", *_COMBINING}
# what JSON Schema defines and a grammar cannot follow, with what to do instead
_REFUSED = {
    "not": "say what may come instead",
    "if": "use anyOf with the cases written out",
    "contains": "leave it out and check the answer",
    "dependentRequired": "use anyOf with the cases written out",
    "dependentSchemas": "use anyOf with the cases written out",
    "dependencies": "use anyOf with the cases written out",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
}


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
    try:
        schema = reader.schema(root, "#", 0)
    except RecursionError:
        raise SchemaError("the schema's references lead back to themselves without an end") from None
    return {**schema, "$defs": reader.definitions} if reader.definitions else schema


class _Reader:
    """Walks a schema once; what references point at becomes a definition of its own."""

    def __init__(self, root: Any, budget: regex.Budget) -> None:
        self.definitions: dict[str, Any] = {}
        self._root, self._budget = root, budget
        self._names: dict[str, str] = {"#": "#"}
        self._num_subschemas = self._num_compared = 0

    def schema(self, schema: Any, place: str, depth: int) -> Any:
        self._num_subschemas += 1
        if depth > MAX_DEPTH or self._num_subschemas > MAX_SUBSCHEMAS:
            raise SchemaError(TOO_LARGE)
        known = self._asserted(schema, place)
        if known.pop("nullable", False) is True and constants(known, place) != [None]:
            return {"anyOf": [self._known(known, place, depth), {"enum": [None]}]}
        return self._known(known, place, depth)

    def _known(self, schema: Schema, place: str, depth: int) -> Any:
        combining = [key for key in _COMBINING if key in schema]
        if combining == ["$ref"] and len(schema) == 1:
            return self._reference(schema["$ref"], place, depth)
        if combining:
            return self._named_once(schema, place, depth)
        values = constants(schema, place)
        return self._typed(schema, place, depth) if values is None else self._values(values, schema, place)

    def _asserted(self, schema: Any, place: str) -> dict[str, Any]:
        """A schema's keywords without those that assert nothing."""
        if schema is True:
            return {}
        if schema is False:
            raise NothingFits(f"the schema at {place} allows nothing")
        if not isinstance(schema, Mapping):
            raise SchemaError(f"the schema at {place} is neither an object nor true")
        if schema.get("not", ...) in ({}, True):
            raise NothingFits(f"the schema at {place} allows nothing")
        for keyword, hint in _REFUSED.items():
            inert = keyword == "if" and not {"then", "else"} & set(schema)
            if keyword in schema and schema[keyword] not in _NEUTRAL.get(keyword, ()) and not inert:
                raise SchemaError(f"the keyword {keyword!r} is not supported; {hint} (at {place})")
        if "$id" in schema and place != "#":
            raise SchemaError(f"$id is supported at the root only; leave it out (at {place})")
        kept = {key: value for key, value in schema.items() if key in _KNOWN}
        if isinstance(kept.get("items"), list):  # as drafts before 2020-12 write tuples
            kept["prefixItems"], rest = kept.pop("items"), schema.get("additionalItems")
            kept |= {} if rest is None else {"items": rest}
        return kept

    def _reference(self, target: Any, place: str, depth: int) -> Any:
        found = self._find(target, place)
        return self._definition(target, lambda: self.schema(found, target, depth + 1))

    def _definition(self, key: str, read: Callable[[], Any]) -> Any:
        """A reference to what was read under this key, or is being read."""
        if key not in self._names:
            self._names[key] = name = f"d{len(self._names)}"
            try:
                self.definitions[name] = read()
            except NothingFits:
                del self._names[key]
                raise
        name = self._names[key]
        return {"$ref": "#" if name == "#" else f"#/$defs/{name}"}

    def _find(self, target: Any, place: str) -> Any:
        if not isinstance(target, str) or not (target == "#" or target.startswith("#/")):
            raise SchemaError(f"$ref is {target!r}; only references within the schema (#/...) are supported (at {place})")
        found = self._root
        for part in target.split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping) and part in found:
                found = found[part]
            else:
                raise SchemaError(f"$ref {target!r} points at nothing (at {place})")
        return found

    def _named_once(self, schema: Schema, place: str, depth: int) -> Any:
        """Below the root, what is put together with references has a name: it may lead back to itself."""
        key = json.dumps(schema, sort_keys=True)
        if not depth or '"$ref"' not in key:
            return self._combined(schema, place, depth)
        return self._definition(key, lambda: self._combined(schema, place, depth))

    def _combined(self, schema: Schema, place: str, depth: int) -> Any:
        """Alternatives are written one by one, each together with all that stands beside them."""
        plain, alternatives = self._conjoined([schema], place)
        if not alternatives:
            return self._known(plain, place, depth)
        keyword, arms = alternatives[0]
        if not isinstance(arms, list) or not arms:
            raise SchemaError(f"{keyword} must be a list of schemas (at {place})")
        beside = [plain] * bool(plain) + [{key: other} for key, other in alternatives[1:]]
        wholes = [{"allOf": [*beside, arm]} if beside else arm for arm in arms]
        if len(arms) > MAX_SUBSCHEMAS:
            raise SchemaError(TOO_LARGE)
        if keyword == "oneOf":
            wholes = self._apart(wholes, place)
        read = []
        for i, whole in enumerate(wholes):
            try:
                read.append(self.schema(whole, f"{place}/{keyword}/{i}", depth + 1))
            except NothingFits as error:
                nothing = error
        if not read:
            raise nothing
        return {"anyOf": read} if len(read) > 1 else read[0]

    def _conjoined(self, schemas: Sequence[Any], place: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
        """All of them as one without $ref and allOf, and the lists of alternatives beside it."""
        plain: dict[str, Any] = {}
        alternatives: list[tuple[str, Any]] = []
        waiting, seen = list(schemas), set()
        while waiting:
            part = self._asserted(waiting.pop(0), place)
            if part.pop("nullable", False) is True:
                waiting.insert(0, {"anyOf": [part, {"const": None}]})
                continue
            target, arms = part.pop("$ref", None), part.pop("allOf", [])
            if not isinstance(arms, list):
                raise SchemaError(f"allOf must be a list of schemas (at {place})")
            if target is not None and target not in seen:
                seen.add(target)
                arms = [self._find(target, place), *arms]
            alternatives += [(key, part.pop(key)) for key in ("oneOf", "anyOf") if key in part]
            plain = merge(plain, part, place) if plain else part
            waiting += arms
        return plain, sorted(alternatives, key=lambda pair: pair[0] != "oneOf")

    def _apart(self, arms: list[Any], place: str) -> list[Any]:
        """The alternatives of oneOf, with what tells them apart required; SchemaError when two may both fit."""
        known: list[Schema] = []
        for arm in list(arms):
            try:
                known.append(self._conjoined([arm], place)[0])
            except NothingFits:
                arms = [other for other in arms if other is not arm]
        if all_apart(known, self._resolved):
            return arms
        for name in dict.fromkeys(name for arm in known for name in arm.get("properties", {})):
            required = [{**arm, "required": [*arm.get("required", []), name]} for arm in known]
            if all(name in arm.get("properties", {}) for arm in known) and all_apart(required, self._resolved):
                return [{"allOf": [arm, {"required": [name]}]} for arm in arms]
        raise SchemaError(
            f"oneOf has alternatives that may both fit; give them different types or a required property "
            f"with different constants, or use anyOf (at {place})"
        )

    def _resolved(self, schema: Any) -> Schema:
        self._num_compared += 1
        if self._num_compared > MAX_COMPARED:
            raise SchemaError("oneOf has too much to compare; use fewer alternatives, or anyOf")
        try:
            return self._conjoined([schema], "oneOf")[0]
        except SchemaError:
            return {}

    def _values(self, values: list[Any], schema: Schema, place: str) -> Any:
        for value in values:
            _check_value(value, place)
        _types(schema, place)
        kept = [value for value in values if fits(value, schema, place, self._budget)]
        if not kept:
            what = "const" if "const" in schema else "enum"
            raise NothingFits(f"{what} has no value of its type that fits what stands beside it (at {place})")
        return {"enum": kept}

    def _typed(self, schema: Schema, place: str, depth: int) -> Any:
        types = _types(schema, place)
        if types is None:
            types = [name for name, keys in _KEYWORDS.items() if any(key in schema for key in keys)]
            if not types:
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
        kept = _bounds(schema, place)
        for name in as_tuple(schema.get("format", ())):
            if name in formats.INTEGERS:
                low, high = formats.INTEGERS[name]
                kept |= {"minimum": max(low, kept.get("minimum", low)), "maximum": min(high, kept.get("maximum", high))}
        step = schema.get("multipleOf")
        if step is None or step == 1:
            return kept
        _check_count(step, "multipleOf", place, MAX_MULTIPLE, least=1)
        low = [kept[key] for key in ("minimum", "exclusiveMinimum") if key in kept]
        high = [kept[key] for key in ("maximum", "exclusiveMaximum") if key in kept]
        if (low or high) and not (low and high and min(high) - max(low) < MAX_MULTIPLE_RANGE):
            raise SchemaError(f"multipleOf with a range needs both its ends, less than {MAX_MULTIPLE_RANGE} apart (at {place})")
        num_written = int(min(high) - max(low)) // int(step) if low else 0  # xgrammar writes all of a range's multiples out
        self._take(("multipleOf", step, *low, *high), max(int(step) // 8, num_written // 64), place)
        return {**kept, "multipleOf": int(step)}

    def _number(self, schema: Schema, place: str, depth: int) -> dict[str, Any]:
        step = schema.get("multipleOf", 0.5)
        if "multipleOf" in schema and (isinstance(step, bool) or not isinstance(step, (int, float)) or step % 1):
            raise SchemaError(f"multipleOf is supported for whole numbers only; leave it out and round (at {place})")
        return {"type": "integer", **self._integer(schema, place, depth)} if "multipleOf" in schema else _bounds(schema, place)

    def _string(self, schema: Schema, place: str, depth: int) -> dict[str, Any]:
        texts = self._texts(schema, place)
        if not texts.patterns and not texts.formats:
            kept = {"minLength": texts.least, "maxLength": texts.most}
            kept = {key: kept[key] for key in kept if key in schema}
            self._take(tuple(kept.items()), min(max(texts.least, texts.most or 0), regex.UNROLLED), place)
            return kept
        alone = not texts.patterns and len(texts.formats) == 1 and texts.least <= 1 and texts.most is None
        if alone and texts.formats[0] in formats.OWN:
            return {"format": texts.formats[0]}
        return {"pattern": self._pattern(texts, place)}

    def _texts(self, schema: Schema, place: str) -> _Texts:
        for key in ("minLength", "maxLength"):
            _check_count(schema.get(key, 0), key, place, MAX_LENGTH)
        patterns = as_tuple(schema.get("pattern", ()))
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise SchemaError(f"pattern must be a text (at {place})")
        try:
            names = [formats.known(name, place) for name in as_tuple(schema.get("format", ()))]
        except ValueError as error:
            raise SchemaError(str(error)) from None
        known = tuple(dict.fromkeys(name for name in names if name is not None))
        most = schema.get("maxLength")
        return _Texts(patterns, known, int(schema.get("minLength", 0)), None if most is None else int(most))

    def _array(self, schema: Schema, place: str, depth: int) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key in ("minItems", "maxItems"):
            if key in schema:
                _check_count(schema[key], key, place, MAX_ITEMS)
                kept[key] = int(schema[key])
        if schema.get("uniqueItems", False) is not False and kept.get("maxItems", 2) > 1:
            raise SchemaError(f"the keyword 'uniqueItems' is not supported; leave it out and check the answer (at {place})")
        if "prefixItems" in schema:
            if not isinstance(schema["prefixItems"], list) or not schema["prefixItems"]:
                raise SchemaError(f"prefixItems must be a list of schemas (at {place})")
            kept["prefixItems"] = [
                self.schema(item, f"{place}/prefixItems/{i}", depth + 1) for i, item in enumerate(schema["prefixItems"])
            ]
        rest = [key for key in ("items", "unevaluatedItems") if key in schema]
        if len(rest) == 2:
            rest.pop()  # no item is left for unevaluatedItems
        value = schema[rest[0]] if rest else "prefixItems" not in schema
        kept["items"] = value if value is False else self.schema(value, f"{place}/{rest[0] if rest else 'items'}", depth + 1)
        return kept

    def _object(self, schema: Schema, place: str, depth: int) -> dict[str, Any]:
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise SchemaError(f"required must be a list of names (at {place})")
        rest = schema.get("additionalProperties", schema.get("unevaluatedProperties"))
        properties = dict(_dictionary(schema, "properties", place))
        given = _dictionary(schema, "patternProperties", place)
        patterns = {_Texts((pattern,), (), 0, None): value for pattern, value in given.items()}
        if "propertyNames" in schema:
            properties, patterns, rest = self._named(schema["propertyNames"], properties, patterns, rest, place)
        for name in required:
            if name not in properties:
                if patterns or rest is False:
                    raise NothingFits(f"required names {name!r}, which properties does not have (at {place})")
                properties[name] = True if rest is None else rest
        if patterns and (properties or rest not in (None, False)):
            raise SchemaError(
                f"patternProperties cannot be combined with properties or additionalProperties; "
                f"name the properties, or leave those out (at {place})"
            )
        if len(patterns) > 1:
            raise SchemaError(f"patternProperties is supported with one pattern only; join them with | (at {place})")
        kept: dict[str, Any] = {}
        if properties:
            kept["properties"] = self._properties(properties, required, rest not in (None, False), place, depth)
            kept["required"] = list(dict.fromkeys(required))
        for texts, value in patterns.items():
            kept["patternProperties"] = {self._pattern(texts, place): self.schema(value, f"{place}/patternProperties", depth + 1)}
        if rest is not None and not patterns:
            kept["additionalProperties"] = rest is not False and self.schema(rest, f"{place}/additionalProperties", depth + 1)
        elif not patterns and not properties and "properties" not in schema:
            kept["additionalProperties"] = {}
        self._count_properties(schema, kept, bool(patterns) or kept.get("additionalProperties", False) is not False, place)
        return kept

    def _properties(self, properties: Schema, required: list[str], is_open: bool, place: str, depth: int) -> dict[str, Any]:
        """Those that may come; one that nothing fits is left out."""
        kept = {}
        for name, value in properties.items():
            try:
                kept[name] = self.schema(value, f"{place}/properties/{name}", depth + 1)
            except NothingFits:
                if name in required or is_open:
                    raise
        return kept

    def _named(self, wanted: Any, properties: dict[str, Any], patterns: _Patterns, rest: Any, place: str) -> _Members:
        """Properties, those by pattern and additional ones, as far as their names are what propertyNames wants."""
        names, alternatives = self._conjoined([wanted, {"type": "string"}], f"{place}/propertyNames")
        if alternatives:
            raise SchemaError(f"propertyNames is supported without anyOf and oneOf; use enum or pattern (at {place})")
        values = constants(names, place)
        if values is not None and not patterns:
            others = {} if rest is False else dict.fromkeys(filter(_is_text, values), True if rest is None else rest)
            both, may_be = {**others, **properties}, set(filter(_is_text, values))
            return {n: value for n, value in both.items() if n in may_be and self._is_named(n, names, place)}, {}, False
        asks = set(names) & set(_KEYWORDS["string"])
        if not asks and values is None:
            return properties, patterns, {} if rest is None and not properties and not patterns else rest
        if patterns or (properties and rest not in (None, False)):
            what = "patternProperties" if patterns else "properties and additionalProperties"
            raise SchemaError(f"propertyNames cannot be combined with {what}; leave one of them out (at {place})")
        if properties or rest is False:
            return {name: value for name, value in properties.items() if self._is_named(name, names, place)}, {}, False
        return {}, {self._texts(names, place): True if rest is None else rest}, None

    def _is_named(self, name: str, wanted: Schema, place: str) -> bool:
        return fits(name, wanted, place, self._budget)

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

    def _pattern(self, texts: _Texts, place: str) -> str:
        given = [*texts.patterns, *map(formats.pattern_of, texts.formats)] or [""]
        try:
            return f"^{regex.rewrite_all(given, self._budget, least=texts.least, most=texts.most)}$"
        except regex.NoTextFits:
            raise NothingFits(f"no text fits {_shown(texts)} (at {place})") from None
        except ValueError as error:
            raise SchemaError(f"{_shown(texts)} cannot be used: {error} (at {place})") from None

    def _take(self, part: Any, num_states: int, place: str) -> None:
        try:
            self._budget.take(part, num_states)
        except ValueError as error:
            raise SchemaError(f"the schema cannot be used: {error} (at {place})") from None


@dataclass(frozen=True, slots=True)
class _Texts:
    """What is asked of a string: expressions to be found in it, formats, and its length."""

    patterns: tuple[str, ...]
    formats: tuple[str, ...]
    least: int
    most: int | None


_Patterns = dict[_Texts, Any]  # properties by what their names must be
_Members = tuple[dict[str, Any], _Patterns, Any]


def _shown(texts: _Texts) -> str:
    asked = [f"the pattern {pattern[:100]!r}" for pattern in texts.patterns] + [f"the format {name!r}" for name in texts.formats]
    length = [] if not texts.least and texts.most is None else ["the length limits"]
    return " together with ".join(asked + length)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _types(schema: Schema, place: str) -> list[str] | None:
    """The types in their order; None when `type` is not given."""
    if "type" not in schema:
        return None
    types = of_types(schema["type"])
    if not types or not all(isinstance(t, str) and t in TYPES for t in types):
        raise SchemaError(f"type is {schema['type']!r}; expected {', '.join(TYPES)} or a list of these (at {place})")
    return list(dict.fromkeys(types))


def _bounds(schema: Schema, place: str) -> dict[str, Any]:
    """The limits of a number; drafts before 6 write exclusive ones as true beside the limit."""
    kept = {key: schema[key] for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if key in schema}
    for key, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(kept.get(key), bool) and kept.pop(key) and limit in kept:
            kept[key] = kept.pop(limit)
    for key, value in kept.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 2**53:
            raise SchemaError(f"{key} must be a number between -2^53 and 2^53 (at {place})")
        if value and abs(value) < 1e-5:
            raise SchemaError(f"{key} is {value}, finer than five places after the point (at {place})")
    return kept


def _dictionary(schema: Schema, key: str, place: str) -> Mapping[str, Any]:
    value = schema.get(key, {})
    if not isinstance(value, Mapping):
        raise SchemaError(f"{key} must be an object (at {place})")
    return value


def _check_count(value: Any, key: str, place: str, most: int, *, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or not least <= value <= most:
        raise SchemaError(f"{key} is {value!r}; expected a whole number from {least} to {most} (at {place})")


def _check_value(value: Any, place: str) -> None:
    if isinstance(value, (list, Mapping)):
        for item in value if isinstance(value, list) else value.values():
            _check_value(item, place)
    elif isinstance(value, int) and abs(value) > 2**53:
        raise SchemaError(f"{value} is more than a JSON number holds exactly (at {place})")


def _no_constant(name: str) -> None:
    raise ValueError(name)
