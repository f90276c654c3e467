"""Random schemas as pydantic, zod, OpenAPI's and other generators write them, and what their grammars let through.

    python -m tests.structured.random_schemas 2000

walks the grammars of that many schemas at random and judges what comes out with the jsonschema package.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
import xgrammar

from tests.structured.walking import byte_compiler, matcher_of, walk
from vlserve.errors import RequestError
from vlserve.structured import formats

ZOD_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
ZOD_UUID = (
    "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}"
    "|00000000-0000-0000-0000-000000000000|ffffffff-ffff-ffff-ffff-ffffffffffff)$"
)
ZOD_DATE = (
    r"(?:(?:\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)-02-29|\d{4}-(?:(?:0[13578]|1[02])-"
    r"(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|(?:02)-(?:0[1-9]|1\d|2[0-8])))"
)
ZOD_DATETIME = rf"^{ZOD_DATE}T(?:(?:[01]\d|2[0-3]):[0-5]\d(?::[0-5]\d(?:\.\d+)?)?(?:Z))$"
ZOD_DURATION = r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$"
ZOD_IPV4 = r"^(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])$"
ZOD_BASE64 = "^$|^(?:[0-9a-zA-Z+/]{4})*(?:(?:[0-9a-zA-Z+/]{2}==)|(?:[0-9a-zA-Z+/]{3}=))?$"
DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"  # pydantic's
SAFE = 2**53 - 1
NAMES = ["name", "kind", "x-y", "a b", "é", "$id_", "count", "min_items"]
Make = Callable[[], Any]


class Generator:
    """Schemas of one random stream."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.definitions: dict[str, Any] = {}

    def root(self) -> dict[str, Any]:
        rng = self.rng
        schema = rng.choice([self.object_, self.object_, self.object_, self.any_, self.pydantic_union])(0)
        schema = dict(schema) if isinstance(schema, Mapping) else {"type": "object"}
        where = rng.choice(["$defs", "$defs", "definitions"])
        text = json.dumps(schema | ({where: self.definitions} if self.definitions else {}))
        schema = json.loads(text.replace("#/$defs/", f"#/{where}/"))
        return schema | rng.choice([{}, {"$schema": "https://json-schema.org/draft/2020-12/schema"}, {"title": "Root"}])

    def any_(self, depth: int) -> Any:
        rng = self.rng
        leaves = [self.string, self.string, self.text_format, self.number, self.constant, self.nothing_asked]
        branches = [
            self.object_,
            self.record,
            self.array,
            self.tuple_,
            self.union,
            self.all_,
            self.reference,
            self.pydantic_union,
        ]
        kind = rng.choice(leaves if depth > 2 or rng.random() < 0.5 else branches)
        schema = kind(depth)
        return self.annotated(schema) if isinstance(schema, dict) else schema

    def annotated(self, schema: dict[str, Any]) -> dict[str, Any]:
        notes: dict[str, Any] = {
            "title": "T",
            "description": "what it is",
            "default": None,
            "examples": [1],
            "deprecated": True,
            "readOnly": True,
            "x-anything": {"a": 1},
            "min_items": 3,
            "minLenght": 3,
            "required_fields": ["a"],
            "$comment": "c",
            "id": "n",
            "example": "e",
            "optional": True,
            "enumNames": ["a"],
            "widget": {"type": "x"},
            "propertyOrdering": ["a"],
        }
        chosen = self.rng.sample(sorted(notes), self.rng.choice([0, 0, 1, 2]))
        return {**{name: notes[name] for name in chosen}, **schema}

    def nothing_asked(self, depth: int) -> Any:
        return self.rng.choice([{}, True, {"type": "null"}, {"type": "boolean"}, {"nullable": True, "type": "boolean"}])

    def number(self, depth: int) -> dict[str, Any]:
        rng, low = self.rng, self.rng.choice([0, 1, -5, 100, 0.5])
        whole = int(low)
        return rng.choice(
            [
                {"type": "integer"},
                {"type": "integer", "minimum": -SAFE, "maximum": SAFE},
                {"type": "integer", "exclusiveMinimum": whole, "maximum": whole + 40},
                {"type": "integer", "minimum": whole, "exclusiveMinimum": True},
                {"type": "integer", "format": rng.choice(["int32", "int64", "uint8"])},
                {"type": "integer", "multipleOf": rng.randint(1, 7)},
                {"type": "number", "minimum": low, "maximum": low + 3},
                {"type": "number", "format": "double"},
                {"type": "number", "multipleOf": rng.choice([1, 0.01])},
                {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": DECIMAL}]},
                {"type": ["integer", "null"], "minimum": whole},
                {"type": ["number", "string"], "maximum": low, "maxLength": 4},
                {"minimum": whole},
            ]
        )

    def string(self, depth: int) -> dict[str, Any]:
        rng, least = self.rng, self.rng.randint(0, 4)
        pattern = rng.choice(
            ["^(a|b)$", r"^\d{4}-(0[1-9]|1[0-2])$", "^[a-z0-9-]+$", r"^(?!x)[a-z]", r"\S", "^a|b$", r"^\p{L}+$", r"\bab"]
        )
        return rng.choice(
            [
                {"type": "string"},
                {"type": "string", "minLength": least, "maxLength": least + 4},
                {"type": "string", "maxLength": least},
                {"type": "string", "pattern": pattern},
                {"type": "string", "pattern": pattern, "minLength": least, "maxLength": least + rng.randint(0, 30)},
                {"type": "string", "allOf": [{"pattern": pattern}, {"pattern": "[a-z]"}]},
                {"type": "string", "contentEncoding": "base64", "format": "base64", "pattern": ZOD_BASE64},
                {"type": "string", "enum": ["a", "é", 'q"', ""], "minLength": 1},
                {"type": "string", "nullable": True, "maxLength": 3},
                {"pattern": pattern},
            ]
        )

    def text_format(self, depth: int) -> dict[str, Any]:
        name = self.rng.choice(["date-time", "date", "time", "duration", "uuid", "email", "uri", "ipv4", "ipv6", "hostname"])
        name = self.rng.choice(
            [name, name, "path", "file-path", "password", "uuid4", "base64url", "ipvanyaddress", "json-string"]
        )
        schema: dict[str, Any] = {"type": "string", "format": name}
        zod = {"email": ZOD_EMAIL, "uuid": ZOD_UUID, "date-time": ZOD_DATETIME, "date": f"^{ZOD_DATE}$", "duration": ZOD_DURATION}
        if name in zod | {"ipv4": ZOD_IPV4} and self.rng.random() < 0.5:
            schema["pattern"] = (zod | {"ipv4": ZOD_IPV4})[name]
        if name == "uri" and self.rng.random() < 0.5:
            schema |= {"minLength": 1, "maxLength": 2083}  # pydantic's HttpUrl
        return schema

    def constant(self, depth: int) -> dict[str, Any]:
        values = self.rng.sample(["a", "b", "é\n", 1, 2.5, None, True, 0], self.rng.randint(1, 3))
        texts = self.rng.sample(["red", "green", "blue"], 2)
        return self.rng.choice(
            [
                {"const": values[0]}, {"enum": values}, {"enum": texts, "type": "string"}, {"const": texts[0], "type": "string"},
                {"const": "a", "enum": ["a"], "type": "string"}, {"enum": [*texts, None], "type": ["string", "null"]},
                {"enum": values, "type": ["string", "integer", "null"]}, {"enum": [1, 5, 9], "minimum": 3},
            ]
        )  # fmt: skip

    def object_(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        names = rng.sample(NAMES, rng.randint(0, 3))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self.any_(depth + 1) for name in names}}
        if rng.random() < 0.1 and names:
            schema["properties"][names[-1]] = rng.choice([False, {"not": {}}])
        schema |= rng.choice([{}, {"required": names[: rng.randint(0, 2)]}, {"required": names}])
        schema |= rng.choice([{}, {"additionalProperties": False}, {"additionalProperties": False}, {"additionalProperties": {}},
                              {"additionalProperties": {"type": "integer"}}, {"unevaluatedProperties": False},
                              {"required": [*names[:1], "more"]}, {"minProperties": 1}])  # fmt: skip
        if rng.random() < 0.1:
            del schema["type"]
        return schema

    def record(self, depth: int) -> dict[str, Any]:
        rng, value = self.rng, self.any_(depth + 1)
        self.definitions["Color"] = {"enum": ["red", "green"], "title": "Color", "type": "string"}
        keys = [
            {"type": "string"}, {"type": "string", "enum": ["a", "b"]}, {"$ref": "#/$defs/Color"}, {"minLength": 1},
            {"type": "string", "pattern": "^[a-z]+$"}, {"format": "date"}, {"const": "k"}, {}, True, {"maxLength": 3},
            {"anyOf": [{"const": "k"}]}, {"type": "string", "format": "uuid", "pattern": ZOD_UUID},
        ]  # fmt: skip
        keyed = {"type": "object", "propertyNames": rng.choice(keys), "additionalProperties": value}
        return rng.choice(
            [
                keyed, keyed, keyed, {"type": "object", "additionalProperties": value}, {"type": "object"},
                {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": value, "required": ["a", "b"]},
                {"type": "object", "patternProperties": {rng.choice(["^x-", "^(a|b)$", ""]): value}},
                {"type": "object", "propertyNames": {"minLength": 2}, "properties": {"a": value, "ab": value}},
            ]
        )  # fmt: skip

    def array(self, depth: int) -> dict[str, Any]:
        rng, item = self.rng, self.any_(depth + 1)
        sizes: list[dict[str, Any]] = [{}, {"minItems": 1}, {"maxItems": 2}, {"minItems": 1, "maxItems": 3}, {"maxItems": 0}]
        more: list[dict[str, Any]] = [{}, {}, {}, {"uniqueItems": False}, {"uniqueItems": True}, {"minContains": 1}]
        return {"type": "array", "items": item, **rng.choice(sizes), **rng.choice(more)}

    def tuple_(self, depth: int) -> dict[str, Any]:
        rng, parts = self.rng, [self.any_(depth + 1), self.any_(depth + 1)]
        return rng.choice(
            [
                {"type": "array", "prefixItems": parts, "minItems": 2, "maxItems": 2},
                {"type": "array", "prefixItems": parts},
                {"type": "array", "prefixItems": parts, "items": False, "minItems": 1},
                {"type": "array", "prefixItems": parts, "items": {"type": "integer"}, "maxItems": 4},
                {"type": "array", "prefixItems": parts, "unevaluatedItems": False},
            ]
        )

    def union(self, depth: int) -> dict[str, Any]:
        rng, arms = self.rng, [self.any_(depth + 1), self.any_(depth + 1)]
        return rng.choice(
            [
                {"anyOf": [arms[0], {"type": "null"}], "default": None},
                {"anyOf": arms},
                {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}, {"type": "null"}]},
                {"oneOf": [self.object_(depth + 1), self.object_(depth + 1)]},
                {
                    "type": "object",
                    "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
                    "properties": {"a": arms[0], "b": arms[1]},
                },
                {"description": "d", "type": ["string", "null"], "anyOf": [{"maxLength": 3}, {"type": "null"}]},
                {"anyOf": [False, arms[0]]},
            ]
        )

    def pydantic_union(self, depth: int) -> dict[str, Any]:
        """A discriminated one, as pydantic and zod write it."""
        rng, names = self.rng, ["Cat", "Dog"]
        for name in names:
            extra = rng.choice([{}, {"default": name}])
            if name not in self.definitions:
                self.definitions[name] = {}  # may refer to itself
                self.definitions[name] = {
                    "type": "object",
                    "properties": {
                        "kind": {"const": name, "title": "Kind", "type": "string", **extra},
                        "age": self.any_(depth + 1),
                    },
                    "required": rng.choice([["kind"], ["kind", "age"], ["age"]]),
                    **rng.choice([{}, {"additionalProperties": False}]),
                }
        arms = [{"$ref": f"#/$defs/{name}"} for name in names]
        mapping = {name: f"#/$defs/{name}" for name in names}
        return {"oneOf": arms, "discriminator": {"mapping": mapping, "propertyName": "kind"}}

    def reference(self, depth: int) -> dict[str, Any]:
        rng = self.rng
        self.definitions["Node"] = {
            "type": "object",
            "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
            "required": ["value"],
        }
        self.definitions["List[int]"] = {"type": "array", "items": {"$ref": "#/$defs/Node"}, "maxItems": 2}
        return rng.choice(
            [
                {"$ref": "#/$defs/Node"}, {"$ref": "#/$defs/Node", "description": "d", "default": None},
                {"allOf": [{"$ref": "#/$defs/Node"}], "title": "N"}, {"$ref": "#/$defs/List%5Bint%5D"},
                {"$ref": "#/$defs/Node", "required": ["next"]}, {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            ]
        )  # fmt: skip

    def all_(self, depth: int) -> dict[str, Any]:
        rng, names = self.rng, self.rng.sample(NAMES, 2)
        arms = [{"type": "object", "properties": {name: self.any_(depth + 1)}, "required": [name]} for name in names]
        arms[1]["properties"] |= rng.choice([{}, {}, arms[0]["properties"]])
        more: list[dict[str, Any]] = [
            {},
            {"type": "object"},
            {"properties": {"own": {"type": "integer"}}},
            {"unevaluatedProperties": False},
        ]
        return {"allOf": [*arms, rng.choice([{}, {"minProperties": 1}, True])], **rng.choice(more)}


FORMATS = jsonschema.FormatChecker(formats=())


def _has_format(name: str) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, str) or re.search(formats.pattern_of(name), value) is not None


for _name in ("date", "date-time", "time", "ipv4", "email", "uuid", "hostname", "duration"):
    FORMATS.checks(_name)(_has_format(_name))


def as_meant(schema: Any) -> Any:
    """OpenAPI's nullable and old drafts' exclusive limits, in the words of 2020-12."""
    if isinstance(schema, list):
        return [as_meant(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    read = {key: as_meant(value) for key, value in schema.items() if key not in ("nullable", "default", "examples")}
    for key, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if read.get(key) is True:
            read[key] = read.pop(limit)
    if schema.get("nullable") is True:
        read = {"anyOf": [read, {"type": "null"}]}
    return read


class Walks:
    """Counts of schemas and documents, invalid documents, and refusals with their reasons."""

    def __init__(self, compiler: xgrammar.GrammarCompiler | None = None) -> None:
        self._compiler = compiler or byte_compiler()
        self.num_schemas = self.num_documents = self.num_unended = 0
        self.refused: Counter[str] = Counter()
        self.wrong: list[tuple[str, str, str]] = []

    def schema(self, schema: Any, rng: random.Random, num_walks: int = 3) -> None:
        self.num_schemas += 1
        try:
            matcher = matcher_of(self._compiler, schema)
        except RequestError as error:
            reason = re.sub(r"\(at .*|structured.json cannot be used: ", "", str(error))
            self.refused[re.sub(r"'.*'|\d+", "N", reason)[:110].strip()] += 1
            return
        validator = jsonschema.Draft202012Validator(as_meant(schema), format_checker=FORMATS)
        for _ in range(num_walks):
            document = walk(matcher, rng, 600, json.dumps(schema))
            if document is None:
                self.num_unended += 1
                continue
            self.num_documents += 1
            error = next(validator.iter_errors(json.loads(document)), None)
            if error is not None:
                self.wrong.append((json.dumps(schema), document, error.message))


def walks(num_schemas: int, seed: int, compiler: xgrammar.GrammarCompiler | None = None) -> Walks:
    rng, done = random.Random(seed), Walks(compiler)
    for _ in range(num_schemas):
        done.schema(Generator(rng).root(), rng)
    return done


def main(num_schemas: int) -> None:
    done = walks(num_schemas, seed=num_schemas)
    num_refused = sum(done.refused.values())
    print(f"{done.num_schemas} schemas, {done.num_documents} documents, {done.num_unended} unended; {len(done.wrong)} wrong")
    print(f"{num_refused} schemas refused ({num_refused / done.num_schemas:.1%}):")
    for reason, number in done.refused.most_common():
        print(f"  {number:6} {reason}")
    for case in done.wrong[:12]:
        print("wrong:", *case, sep="\n    ")


if __name__ == "__main__":
    main(int(sys.argv[1]))
