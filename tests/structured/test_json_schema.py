"""What xgrammar would pass over is refused by name and place; what is taken lets only valid documents through."""

from __future__ import annotations

import ipaddress
import json
import random
import re
import uuid
from collections.abc import Callable
from datetime import date, datetime
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import xgrammar

from tests.structured.random_schemas import (
    DECIMAL,
    ZOD_DATETIME,
    ZOD_DURATION,
    ZOD_EMAIL,
    ZOD_IPV4,
    ZOD_UUID,
    walks,
)
from tests.structured.walking import byte_compiler, matcher_of, wander
from vlserve.config import StructuredOutput
from vlserve.errors import RequestError
from vlserve.structured.conjunction import SchemaError
from vlserve.structured.grammar import to_grammar
from vlserve.structured.json_schema import read_schema, rewrite_schema
from vlserve.structured.regex import Budget


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    return byte_compiler()


NAMES = ["a", "b", "ab", "c d", "é", 'x"y', "_"]
PATTERNS = ["^a", "b$", r"^[A-Z]{2,4}-\d+$", "[^a]x", "^.{2,5}$", r"^\S+$", "^(?:ab|c)+$", "^a|b$", r"^[\]^-]+$", "é", "^$", ""]


def number(rng: random.Random, kind: str) -> dict[str, Any]:
    low = rng.choice([rng.randint(-1000, 1000), rng.randint(-(10**12), 10**12), 0, round(rng.uniform(-5, 5), rng.randint(0, 4))])
    low = int(low) if kind == "integer" else low
    schema: dict[str, Any] = {"type": kind}
    if rng.random() < 0.5:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.5:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice([2, 3, 1000])
    if kind == "integer" and len(schema) in (1, 3) and rng.random() < 0.5:
        schema["multipleOf"] = rng.randint(1, 3)
    return schema


def string(rng: random.Random, kind: str) -> dict[str, Any]:
    least = rng.randint(0, 5)
    bounds = [{}, {"minLength": least}, {"maxLength": least}, {"minLength": least, "maxLength": least + 3}]
    return {"type": "string", **rng.choice([*bounds, {"pattern": rng.choice(PATTERNS)}])}


def array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    schema: dict[str, Any] = {"type": "array", "minItems": least, "items": random_schema(rng, depth + 1)}
    if rng.random() < 0.6:
        schema["maxItems"] = least + 2
    if rng.random() < 0.3:
        schema["prefixItems"] = [random_schema(rng, depth + 1) for _ in range(2)]
    return schema


def closed(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    required = [name for name in names if rng.random() < 0.5]
    schema = {"type": "object", "properties": {n: random_schema(rng, depth + 1) for n in names}, "required": required}
    if rng.random() < 0.3:
        schema["minProperties"] = rng.randint(0, len(names))
    if rng.random() < 0.3:
        schema["maxProperties"] = max(len(required), schema.get("minProperties", 0))
    return schema


def opened(rng: random.Random, depth: int) -> dict[str, Any]:
    more: list[dict[str, Any]] = [
        {"properties": {"a": random_schema(rng, depth + 1)}, "additionalProperties": random_schema(rng, depth + 1)},
        {"additionalProperties": random_schema(rng, depth + 1), "minProperties": 1, "maxProperties": 3},
        {"patternProperties": {rng.choice(["^x-", "^[a-z]{1,3}$", "é"]): random_schema(rng, depth + 1)}},
        {"propertyNames": rng.choice([{"pattern": "^[a-c]+$"}, {"enum": ["k", "l"]}, {"maxLength": 3}])},
        {},
    ]
    return {"type": "object", **rng.choice(more)}


def random_schema(rng: random.Random, depth: int = 0) -> Any:
    leaves: list[Callable[[], Any]] = [
        lambda: number(rng, rng.choice(["integer", "number"])),
        lambda: string(rng, "string"),
        lambda: {"type": rng.choice(["null", "boolean"])},
        lambda: {"enum": rng.sample([1, 2.5, "a", 'é"\n', None, True, [1, "x"], {"a": 1}, "", -0.1, 1e20], 3)},
        lambda: {"const": rng.choice([1, "x\\y", {"b": [1]}, False])},
        lambda: {"type": rng.sample(["integer", "string", "null", "array"], 2), "maxLength": 4, "minimum": 3},
        lambda: {"$ref": rng.choice(["#/$defs/chain", "#/$defs/list/items"])},
        lambda: {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "string", "maxLength": 2}, {"const": None}]},
        lambda: True,
    ]
    branches: list[Callable[[], Any]] = [
        lambda: array(rng, depth),
        lambda: closed(rng, depth),
        lambda: opened(rng, depth),
        lambda: {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]},
        lambda: {"allOf": [random_schema(rng, depth + 1)], "title": "one"},
    ]
    return rng.choice(leaves + branches * (2 if depth == 0 else 1 if depth < 3 else 0))()


DEFINITIONS = {
    "chain": {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#/$defs/chain"}, {"type": "null"}]}}, "required": ["n"]},
    "list": {"type": "array", "items": {"type": "integer", "minimum": 5}},
}


def test_what_the_grammar_lets_through_is_valid(compiler: xgrammar.GrammarCompiler) -> None:
    rng, ended = random.Random(5), 0
    for _ in range(200):
        schema = random_schema(rng)
        schema = {**({} if schema is True else schema), "$defs": DEFINITIONS}
        for _ in range(2):
            document = wander(compiler, schema, rng)
            if document is not None:
                jsonschema.Draft202012Validator(schema).validate(json.loads(document))
                ended += 1
    assert ended > 350


def test_schemas_as_generators_write_them(compiler: xgrammar.GrammarCompiler) -> None:
    done = walks(120, seed=14, compiler=compiler)
    assert not done.wrong and done.num_documents > 200
    assert sum(done.refused.values()) < 0.25 * done.num_schemas, done.refused


# what generators write, with a document that may come and one that may not
TAKEN: list[tuple[Any, Any, Any]] = [
    ({"type": "string", "pattern": "^(a|b)$"}, "a", "xax"),
    ({"type": "string", "pattern": r"^\d{4}-(0[1-9]|1[0-2])$"}, "7000-10", "7000-10x"),
    ({"type": "string", "format": "date"}, "2026-12-01", "x2026-12-01"),
    ({"type": "string", "format": "date-time"}, "2026-12-01T10:00:00Z", "2026-12-01T10:00:00Zx"),
    ({"type": "string", "x-anything": 1, "min_items": 2, "minLenght": 3, "id": "a"}, "", 1),
    ({"type": "string", "format": "email", "pattern": ZOD_EMAIL}, "a@b.co", "a..b@b.co"),
    ({"type": "string", "format": "uuid", "pattern": ZOD_UUID}, "0" * 8 + "-0000-4000-8000-" + "0" * 12, "0" * 36),
    ({"type": "string", "format": "date-time", "pattern": ZOD_DATETIME}, "2024-02-29T10:00:00Z", "2024-02-29T10:00:00+01:00"),
    ({"type": "string", "format": "duration", "pattern": ZOD_DURATION}, "P1DT2H", "P1D2H"),
    ({"type": "string", "format": "ipv4", "pattern": ZOD_IPV4}, "10.0.0.1", "10.0.0.256"),
    ({"type": "string", "format": "cuid2", "pattern": "^[0-9a-z]+$"}, "ab0", "AB"),
    ({"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083}, "https://a.b/c?d=e", "a b"),
    ({"type": "string", "format": "path"}, "/a b", 1),
    ({"type": "string", "format": "uuid4"}, "0" * 8 + "-0000-4000-8000-" + "0" * 12, "0" * 8 + "-0000-1000-8000-" + "0" * 12),
    ({"type": "string", "pattern": DECIMAL}, "-1.5", "+."),
    ({"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 3}, "abc", "abcd"),
    ({"type": "integer", "format": "int32"}, 2**31 - 1, 2**31),
    ({"type": "number", "multipleOf": 1, "minimum": 0, "maximum": 9}, 3, 2.5),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, 4, 3),
    ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}}, {"k": 1}, {"k": "a"}),
    ({"propertyNames": {"$ref": "#/$defs/C"}, "additionalProperties": {"type": "integer"}, "$defs": {"C": {"enum": ["a"]}}},
     {"a": 1}, {"b": 1}),
    ({"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "null"}, "required": ["a"]},
     {"a": None}, {"b": None}),
    ({"propertyNames": {"pattern": "^(a|b)$"}, "additionalProperties": {"type": "null"}}, {"a": None}, {"xa": None}),
    ({"type": "array", "items": [{"type": "integer"}, {"type": "null"}], "additionalItems": False}, [1, None], [1, None, 2]),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 1, "maxItems": 1}, [1], [1, 1]),
    ({"type": "object", "required": ["a"], "additionalProperties": {"type": "integer"}}, {"a": 1, "b": 2}, {"b": 2}),
    ({"type": "object", "properties": {"a": {"not": {}}, "b": {}}}, {"b": 1}, {"a": 1}),
    ({"type": "string", "nullable": True}, None, 1),
    ({"allOf": [{"$ref": "#/$defs/A"}, {"required": ["a"]}], "$defs": {"A": {"properties": {"a": {"type": "null"}}}}},
     {"a": None}, {}),
    ({"$ref": "#/$defs/A", "minimum": 3, "$defs": {"A": {"type": "integer", "maximum": 4}}}, 3, 2),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"b": 1}, {}),
    ({"type": "string", "enum": ["a", "bc"], "minLength": 2}, "bc", "a"),
    ({"anyOf": [False, {"type": "null"}]}, None, 1),
    ({"minLength": 2}, "ab", "a"),
    ({"unevaluatedProperties": False, "additionalProperties": {"type": "null"}}, {"a": None}, {"a": 1}),
    ({"oneOf": [{"properties": {"k": {"const": k, "default": k}}} for k in "ab"], "discriminator": {"propertyName": "k"}},
     {"k": "a"}, {}),
    ({"oneOf": [{"type": "object", "properties": {k: {}}, "required": [k]} for k in "ab"]}, {"a": 1}, {"a": 1, "b": 1}),
]  # fmt: skip


@pytest.mark.parametrize("schema,good,bad", TAKEN, ids=[str(n) for n in range(len(TAKEN))])
def test_what_generators_write_is_held(compiler: xgrammar.GrammarCompiler, schema: Any, good: Any, bad: Any) -> None:
    matcher = matcher_of(compiler, schema)
    for document, fits in ((good, True), (bad, False)):
        matcher.reset()
        assert (matcher.accept_string(json.dumps(document)) and matcher.is_completed()) == fits, document


def test_what_leads_back_to_itself_is_read_once(compiler: xgrammar.GrammarCompiler) -> None:
    """As pydantic writes a tree of two kinds of nodes, whose kinds have defaults."""
    union = {"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "discriminator": {"propertyName": "kind"}}
    arms = {
        kind: {
            "type": "object",
            "properties": {"kind": {"const": kind, "default": kind}, "in": {"anyOf": [union, {"type": "null"}]}},
        }
        for kind in "AB"
    }
    matcher = matcher_of(compiler, {**union, "$defs": arms})
    assert matcher.accept_string('{"kind": "A", "in": {"kind": "B", "in": {"kind": "A"}}}') and matcher.is_completed()


FORMATS: dict[str, Callable[[str], Any]] = {
    "date": date.fromisoformat,
    "date-time": lambda text: datetime.fromisoformat(text[:19]),
    "time": lambda text: datetime.fromisoformat(f"2000-01-01T{text[:8]}"),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
    "email": lambda text: text.index("@", 1) < text.index(".", text.index("@")),
    "hostname": lambda text: text.encode("idna"),
    "duration": lambda text: re.fullmatch(r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?)", text),
    "uri": lambda text: urlsplit(text).scheme,
}


@pytest.mark.parametrize("format", FORMATS)
def test_formats_come_out_right(compiler: xgrammar.GrammarCompiler, format: str) -> None:
    rng = random.Random(format)
    for _ in range(60):
        document = wander(compiler, {"type": "string", "format": format}, rng)
        if document is not None and not document.startswith('"0000'):  # Python's calendar begins with the year 1
            assert FORMATS[format](json.loads(document)), document


def test_29_february_is_a_day_of_leap_years_only(compiler: xgrammar.GrammarCompiler) -> None:
    schema = StructuredOutput(json={"type": "string", "format": "date"})
    matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(to_grammar(schema)))
    for year in range(1888, 2112):
        matcher.reset()
        is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
        assert (matcher.accept_string(f'"{year}-02-29"') and matcher.is_completed()) == is_leap


UNSUPPORTED: list[tuple[Any, str]] = [
    ({"type": "array", "uniqueItems": True}, r"'uniqueItems' is not supported; leave it out .* \(at #\)"),
    ({"items": {"not": {"type": "null"}}}, r"'not' is not supported; say what may come instead \(at #/items\)"),
    ({"properties": {"a": {"if": {}, "then": {}}}}, r"'if' is not supported; use anyOf .* \(at #/properties/a\)"),
    ({"anyOf": [{"type": "null"}, {"type": "array", "contains": {}}]}, r"'contains' is not supported; .* \(at #/anyOf/1\)"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
    ({"$dynamicRef": "#a"}, r"'\$dynamicRef'"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"if": {}, "else": 1}}}, r"'if' is not supported; .* \(at #/\$defs/a\)"),
    ({"type": "number", "multipleOf": 0.1}, "multipleOf is supported for whole numbers only"),
    ({"type": "integer", "multipleOf": 2000}, "multipleOf is 2000; expected a whole number from 1 to 1024"),
    ({"type": "integer", "multipleOf": 2, "minimum": 0}, "both its ends"),
    ({"type": "string", "format": "regex"}, "format 'regex' is not supported; leave it out"),
    ({"type": "string", "format": 3}, "format must be a text"),
    ({"type": "string", "pattern": "a.*b", "maxLength": 30000}, "needs too large an automaton; use shorter"),
    ({"type": "string", "pattern": "^a$", "minLength": 2}, "no text fits the pattern '.a.' together with the length limits"),
    ({"type": "string", "pattern": "(?<=a)"}, r"pattern '\(\?<=a\)' cannot be used: lookbehind"),
    ({"type": "string", "maxLength": 10**9}, "maxLength is 1000000000; expected a whole number from 0 to 65536"),
    ({"type": "array", "maxItems": 10**9}, "maxItems"),
    ({"type": "array", "items": 3}, "neither an object nor true"),
    ({"type": "string", "const": 3}, "const has no value of its type"),
    ({"const": 3, "minimum": 4}, "that fits what stands beside it"),
    ({"const": 3, "enum": [4]}, "const is not one of enum's values"),
    ({"enum": [[1]], "minItems": 2}, "lists or objects cannot be combined with minItems"),
    ({"const": 2**60}, "more than a JSON number holds"),
    ({"enum": []}, "enum must be a list with values"),
    ({"anyOf": []}, "anyOf must be a list of schemas"),
    ({"allOf": [{"type": "object"}, {"type": "string"}]}, "types 'object' and 'string' exclude each other"),
    ({"allOf": [{"multipleOf": 0.5}, {"multipleOf": 0.7}]}, "multipleOf is asked for twice"),
    ({"type": "array", "anyOf": [{"type": "object"}, {"type": "null"}]}, "exclude each other"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf has alternatives that may both fit"),
    ({"$ref": "http://example.com/a.json"}, "only references within the schema"),
    ({"$ref": "#/$defs/a"}, "points at nothing"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "required names 'a', which properties does not have"),
    ({"type": "object", "required": ["a"], "properties": {"a": False}}, "at #/properties/a allows nothing"),
    ({"type": "object", "properties": {"a": {}}, "patternProperties": {"b": {}}}, "patternProperties cannot be combined"),
    ({"type": "object", "patternProperties": {"b": {}, "c": {}}}, "one pattern only"),
    (
        {"propertyNames": {"maxLength": 3}, "properties": {"a": {}}, "additionalProperties": {}},
        "propertyNames cannot be combined",
    ),
    ({"type": "object", "additionalProperties": True, "minProperties": 3}, "minProperties above 1"),
    ({"type": "object", "properties": {str(i): {} for i in range(40)}, "maxProperties": 9}, "at most 32 properties"),
    ({"type": "number", "minimum": 1e-9}, "finer than five places"),
    ({"type": "number", "exclusiveMinimum": "1"}, "must be a number"),
    ({"type": []}, r"type is \[\]"),
    ({"not": {}}, "allows nothing"),
    (False, "allows nothing"),
    ([], "neither an object nor true"),
]


@pytest.mark.parametrize("schema,message", UNSUPPORTED, ids=[str(n) for n in range(len(UNSUPPORTED))])
def test_what_is_not_supported_is_refused_by_name_and_place(schema: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        read_schema(json.dumps(schema))
    with pytest.raises(RequestError, match="structured.json cannot be used"):
        to_grammar(StructuredOutput(json=json.dumps(schema)))


def test_size_and_depth_are_bounded() -> None:
    deep: Any = {}
    for _ in range(40):
        deep = {"items": deep}
    wide = {"anyOf": [{"const": i} for i in range(600)]}
    for schema in (deep, wide):
        with pytest.raises(SchemaError, match="too large"):
            rewrite_schema(schema, Budget())
    lengths = {"anyOf": [{"type": "string", "maxLength": 500 + i} for i in range(9)]}
    with pytest.raises(SchemaError, match=r"come to 1152 states, 1024 are allowed; .* \(at #/anyOf/8\)"):
        rewrite_schema(lengths, Budget())
    rewrite_schema({"anyOf": [{"type": "string", "maxLength": 500} for _ in range(9)]}, Budget())
    even = {"type": "integer", "multipleOf": 2, "minimum": 0}
    rewrite_schema({"anyOf": [{**even, "maximum": 9000 + i} for i in range(9)]}, Budget())
    rewrite_schema({"anyOf": [{**even, "maximum": 90 + i} for i in range(400)]}, Budget())
    with pytest.raises(SchemaError, match="states, 1024 are allowed"):
        rewrite_schema({"anyOf": [{**even, "maximum": 9000 + i} for i in range(40)]}, Budget())
    for text in ('{"minimum": NaN}', "{'a': 1}", "[" * 9000):
        with pytest.raises(SchemaError, match="not valid JSON"):
            read_schema(text)


def test_constants_are_matched_in_linear_time() -> None:
    """Python's own search would take minutes, and hold up all threads meanwhile."""
    for pattern in ("^(a+)+$", "^(a|aa)+$", "(?=(a*)*b)a"):
        with pytest.raises(SchemaError, match="fits what stands beside"):
            rewrite_schema({"const": "a" * 60 + "!", "pattern": pattern}, Budget())
        with pytest.raises(SchemaError, match="fits what stands beside"):
            rewrite_schema({"enum": ["a" * 60 + "!"], "type": "string", "pattern": pattern}, Budget())
    names = {"type": "object", "properties": {"a" * 60 + "!": {}, "aa": {}}, "propertyNames": {"pattern": "^(a+)+$"}}
    assert list(rewrite_schema(names, Budget())["properties"]) == ["aa"]
    for value in ("x\ny", 'a"b', "\u00e9", ""):
        assert rewrite_schema({"const": value, "pattern": "^[^z]*$"}, Budget()) == {"enum": [value]}


def test_constants_together_are_those_in_both() -> None:
    both = {"allOf": [{"enum": [1, True, "a", [1, True], {"b": [1]}, None]}, {"enum": [1.0, [1, 1], {"b": [1.0]}, "a", 0]}]}
    assert rewrite_schema(both, Budget()) == {"enum": [1, "a", {"b": [1]}]}


def test_alternatives_that_share_a_tree_are_not_compared_for_ever() -> None:
    tree: dict[str, Any] = {}
    for side in "AB":
        for i in range(40):
            below = {"$ref": f"#/$defs/{side}{i + 1}"}
            tree[f"{side}{i}"] = {"type": "object", "required": ["a", "b"], "properties": {"a": below, "b": below}}
        tree[f"{side}40"] = {"type": "string"}
    with pytest.raises(SchemaError, match="too much to compare; use fewer"):
        rewrite_schema({"oneOf": [{"$ref": "#/$defs/A0"}, {"$ref": "#/$defs/B0"}], "$defs": tree}, Budget())


def test_references_are_followed_once_and_cycles_end() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#/properties/left"}}}
    assert rewrite_schema(tree, Budget()) == {
        "type": "object",
        "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#/$defs/d1"}},
        "required": [],
        "$defs": {"d1": {"$ref": "#"}},
    }


def test_alternatives_of_one_of_may_differ_in_a_required_constant() -> None:
    def arm(kind: str) -> dict[str, Any]:
        return {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}

    schema = {
        "oneOf": [{"$ref": "#/$defs/cat"}, arm("dog")],
        "$defs": {"cat": arm("cat")},
        "discriminator": {"propertyName": "kind"},
    }
    assert len(rewrite_schema(schema, Budget())["anyOf"]) == 2
    with pytest.raises(SchemaError, match="may both fit"):
        rewrite_schema({"oneOf": [arm("dog"), arm("dog")]}, Budget())
