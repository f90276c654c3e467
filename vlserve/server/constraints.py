"""How an answer must look, in the words of OpenAI, vLLM, SGLang, llama.cpp and LMDeploy, as one StructuredOutput.

Each spelling is read here and nowhere else; two of them in one request are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from vlserve.config import StructuredOutput
from vlserve.errors import RequestError
from vlserve.server.protocol import SamplingBody, Strict, rename


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's three types, and what others send in the same place."""

    type: Literal["text", "json_object", "json_schema", "structural_tag", "regex", "regex_schema", "grammar"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | str | None = Field(None, alias="schema", description="llama.cpp's and MLC's, of either JSON type")
    format: dict[str, Any] | None = Field(None, description="of a structural tag")
    structures: list[dict[str, Any]] | None = Field(None, description="of a structural tag as SGLang and older vLLM write it")
    triggers: list[str] | None = None
    regex: str | None = None
    pattern: str | None = None
    regex_schema: str | None = Field(None, description="LMDeploy's")
    grammar: str | None = None


# which keys go with a type; each of the first is enough
_KEYS: dict[str, tuple[str, ...]] = {
    "text": (),
    "json_object": ("schema",),
    "json_schema": ("json_schema", "schema"),
    "structural_tag": ("format", "structures"),
    "regex": ("regex", "pattern"),
    "regex_schema": ("regex_schema",),
    "grammar": ("grammar",),
}


class StructuredBody(Strict):
    """vLLM's structured_outputs: exactly one of the first six."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: bool | None = Field(None, description="JSON comes on one line in any case")
    disable_additional_properties: bool | None = Field(None, description="objects are closed in any case")
    disable_fallback: bool | None = Field(None, description="there is no other way to fall back on")


_ALWAYS_SO = {"disable_any_whitespace", "disable_additional_properties", "disable_fallback"}
# fields of the body beside response_format, with the kind of StructuredOutput that they are
FIELDS = {
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


class ConstrainedBody(SamplingBody):
    """A request for answers that may have to look a certain way."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredBody | None = None
    json_schema: dict[str, Any] | str | None = Field(None, description="SGLang's and llama.cpp's for structured_outputs.json")
    regex: str | None = Field(None, description="SGLang's for structured_outputs.regex")
    ebnf: str | None = Field(None, description="SGLang's for structured_outputs.grammar")
    grammar: str | None = Field(None, description="llama.cpp's for structured_outputs.grammar")
    structural_tag: dict[str, Any] | str | None = Field(None, description="older vLLM's for structured_outputs.structural_tag")
    guided_json: dict[str, Any] | str | None = Field(None, description="older vLLM's for structured_outputs.json")
    guided_regex: str | None = Field(None, description="older vLLM's for structured_outputs.regex")
    guided_choice: list[str] | None = Field(None, description="older vLLM's for structured_outputs.choice")
    guided_grammar: str | None = Field(None, description="older vLLM's for structured_outputs.grammar")
    guided_decoding_backend: str | None = Field(None, description="older vLLM's: who follows the form, not what it is")

    def wanted(self) -> tuple[str, StructuredOutput] | None:
        """The field that says how the answer must look, and what it says; RequestError when there are two."""
        found = list(self._wanted())
        if len(found) > 1:
            names = [place.partition(".")[0] for place, _, _ in found]
            raise RequestError(f"{' and '.join(names)} exclude each other; give one of them", param=names[-1])
        for place, kind, value in found:
            return place, _output(place, kind, value)
        return None

    def renamed(self, error: RequestError) -> RequestError:
        """A grammar's error with the field that asked for it."""
        if error.param != "structured" and not (error.param or "").startswith("structured."):
            return super().renamed(error)
        place = next((place for place, _, _ in self._wanted()), "structured_outputs")
        return rename(error, place)

    def _wanted(self) -> Iterator[tuple[str, str, Any]]:
        """Field, kind and value of everything that is asked for."""
        if self.response_format is not None:
            yield from _of_format(self.response_format)
        if self.structured_outputs is not None:
            given = self.structured_outputs.model_dump(exclude_none=True, by_alias=True, exclude=_ALWAYS_SO)
            kind = next(iter(given)) if len(given) == 1 else ""
            yield f"structured_outputs.{kind}" if kind else "structured_outputs", kind, given.get(kind, given)
        for name, kind in FIELDS.items():
            value = getattr(self, name)
            if value is not None:
                yield name, kind, value


def _of_format(form: ResponseFormat) -> Iterator[tuple[str, str, Any]]:
    given = form.model_dump(exclude_none=True, by_alias=True, exclude={"type"})
    keys = _KEYS[form.type]
    extra = sorted(set(given) - set(keys) - ({"triggers"} if "structures" in given else set()))
    if extra:
        place = f"response_format.{extra[0]}"
        raise RequestError(f"{place} does not go with the type {form.type!r}; {_way_out(form.type)}", param=place)
    if len(set(given) & set(keys)) > 1:
        names = [f"response_format.{key}" for key in keys if key in given]
        raise RequestError(f"{' and '.join(names)} exclude each other; give one of them", param=names[-1])
    key = next(iter(set(given) & set(keys)), None)
    if form.type == "text":
        return
    if key is None and form.type != "json_object":
        raise RequestError(f"response_format.{keys[0]} is missing; {_way_out(form.type)}", param=f"response_format.{keys[0]}")
    place = f"response_format.{key}" if key else "response_format"
    if form.type == "structural_tag":
        format = form.format if form.structures is None else _older_tag(form.structures, form.triggers)
        yield place, "structural_tag", {"type": "structural_tag", "format": format}
    elif key == "json_schema":
        yield f"{place}.schema", "json", given[key]["schema"]
    elif key is None:
        yield place, "json_object", True
    else:
        yield place, {"schema": "json", "grammar": "grammar"}.get(key, "regex"), given[key]


def _way_out(type: str) -> str:
    keys = _KEYS[type]
    return f"{type} takes {' or '.join(keys)}" if keys else f"{type} takes nothing else"


def _older_tag(structures: list[dict[str, Any]], triggers: list[str] | None) -> dict[str, Any]:
    """SGLang's and older vLLM's list of begin, schema and end, as xgrammar's format."""
    tags = []
    for i, tag in enumerate(structures):
        if set(tag) != {"begin", "schema", "end"}:
            place = f"response_format.structures[{i}]"
            raise RequestError(f"{place} must have begin, schema and end", param=place)
        content = {"type": "json_schema", "json_schema": _read_json(tag["schema"], f"response_format.structures[{i}].schema")}
        tags.append({"type": "tag", "begin": tag["begin"], "content": content, "end": tag["end"]})
    if not triggers:
        raise RequestError("response_format.triggers is missing; structures need it", param="response_format.triggers")
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


def _read_json(value: Any, place: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise RequestError(f"{place} is not valid JSON", param=place) from None


def _output(place: str, kind: str, value: Any) -> StructuredOutput:
    if not kind:  # of structured_outputs, none or several
        return StructuredOutput(**value | ({"choice": tuple(value["choice"])} if "choice" in value else {}))
    if not value and value is not False:
        raise RequestError(f"{place} is empty; leave it out or say what may come", param=place)
    if kind == "structural_tag" and isinstance(value, Mapping) and "structures" in value:
        value = {"type": "structural_tag", "format": _older_tag(value["structures"], value.get("triggers"))}
    given: dict[str, Any] = {kind: tuple(value) if kind == "choice" else value}
    try:
        return StructuredOutput(**given)
    except RequestError as error:
        raise rename(error, place) from None


def as_format(wanted: StructuredOutput) -> dict[str, Any]:
    """The same as part of a structural tag."""
    if wanted.json_object:
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if wanted.json is not None:
        return {"type": "json_schema", "json_schema": _read_json(wanted.json, "structured.json")}
    if wanted.regex is not None:
        return {"type": "regex", "pattern": wanted.regex}
    if wanted.grammar is not None:
        return {"type": "grammar", "grammar": wanted.grammar}
    if wanted.choice:
        return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in wanted.choice]}
    tag = _read_json(wanted.structural_tag, "structured.structural_tag")
    if not isinstance(tag, Mapping) or not isinstance(tag.get("format"), Mapping):
        raise RequestError('structured.structural_tag must be {"type": "structural_tag", "format": ...}', param="structured")
    return dict(tag["format"])


def after(before: dict[str, Any], wanted: StructuredOutput, *, optional: bool) -> StructuredOutput:
    """The same behind something else, with up to two line ends between them."""
    first = {"type": "sequence", "elements": [before, {"type": "regex", "pattern": "\\n{0,2}"}]}
    parts = [{"type": "optional", "content": first} if optional else first, as_format(wanted)]
    return StructuredOutput(structural_tag={"type": "structural_tag", "format": {"type": "sequence", "elements": parts}})
