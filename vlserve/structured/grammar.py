"""From what an answer must look like to a grammar, the same in the front, which checks it, and in the rank.

xgrammar is imported when the first such request comes: it takes seconds, since it imports transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vlserve.config import StructuredOutput
from vlserve.errors import RequestError
from vlserve.structured import regex
from vlserve.structured.conjunction import SchemaError
from vlserve.structured.json_schema import read_schema, rewrite_schema

if TYPE_CHECKING:
    import xgrammar

COMPILE_LIMIT_S = 120.0  # for one grammar, also where it has to wait for others
# JSON comes on one line, as json.dumps writes it: left to themselves, small models write spaces for ever. Within a tag
# xgrammar knows a limit only, in characters between two parts.
MAX_TAG_WHITESPACE = 2
MAX_TAG_DEPTH, MAX_TAG_PARTS, MAX_TAG_REPEAT = 16, 1024, 1024
_OBJECT = '{"type": "object"}'

# formats of a structural tag with their fields; the others need token ids or are not exact
_TAG_FIELDS: dict[str, frozenset[str]] = {
    "any_text": frozenset({"excludes"}),
    "const_string": frozenset({"value"}),
    "json_schema": frozenset({"json_schema", "style"}),
    "regex": frozenset({"pattern"}),
    "grammar": frozenset({"grammar"}),
    "sequence": frozenset({"elements"}),
    "or": frozenset({"elements"}),
    "optional": frozenset({"content"}),
    "plus": frozenset({"content"}),
    "star": frozenset({"content"}),
    "repeat": frozenset({"content", "min", "max"}),
    "tag": frozenset({"begin", "content", "end"}),
    "triggered_tags": frozenset({"triggers", "tags", "at_least_one", "stop_after_first", "excludes"}),
    "tags_with_separator": frozenset({"tags", "separator", "at_least_one", "stop_after_first"}),
}


@lru_cache(maxsize=256)
def check(structured: StructuredOutput) -> None:
    """Raises RequestError when the engine could not follow it. Takes seconds the first time; for worker threads."""
    import torch
    import xgrammar

    param = f"structured.{structured.kind}"
    grammar = to_grammar(structured)
    # a vocabulary of single bytes, with one end token: the compiler finds the rest of what can be wrong
    vocabulary = xgrammar.TokenizerInfo([*(bytes([i]) for i in range(256)), b""], stop_token_ids=[256])
    try:
        compiled = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False).compile_grammar(grammar)
        bits = torch.zeros(1, 9, dtype=torch.int32)
        xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(bits)
    except (RuntimeError, ValueError) as error:
        raise RequestError(f"{param} cannot be used: {_reason(error)}", param=param) from None
    bits[0, 8] &= 1
    if not bits.any():
        raise RequestError(f"{param} cannot be used: nothing fits it", param=param)


def to_grammar(structured: StructuredOutput) -> xgrammar.Grammar:
    """The grammar; raises RequestError naming the field when there is none."""
    from xgrammar import Grammar

    param = f"structured.{structured.kind}"
    try:
        if structured.json is not None or structured.json_object:
            schema = _OBJECT if structured.json is None else str(structured.json)
            return Grammar.from_json_schema(read_schema(schema), strict_mode=True, any_whitespace=False)
        if structured.regex is not None:
            return Grammar.from_regex(regex.rewrite(structured.regex, regex.Budget()))
        if structured.choice:
            texts = [{"type": "const_string", "value": text} for text in structured.choice]
            return Grammar.from_structural_tag(_tag({"type": "or", "elements": texts}))
        if structured.grammar is not None:
            return _read_grammar(structured.grammar)
        return Grammar.from_structural_tag(_read_tag(str(structured.structural_tag)))
    except (RuntimeError, ValueError) as error:
        raise RequestError(f"{param} cannot be used: {_reason(error)}", param=param) from None


def is_json(structured: StructuredOutput) -> bool:
    """JSON, or free text with JSON in it: a control character other than a newline is never wanted there.

    xgrammar lets them into strings with a length limit, where JSON forbids them.
    """
    return structured.kind in ("json", "json_object", "structural_tag")


def _read_grammar(text: str) -> xgrammar.Grammar:
    from xgrammar import Grammar

    checked = _check_grammar(text, regex.Budget())
    try:
        return Grammar.from_ebnf(checked)
    except (RuntimeError, ValueError) as error:
        if re.search(r"^\s*root\s*::=", text, re.MULTILINE):
            raise
        raise ValueError(f"{_reason(error)}; expected GBNF (EBNF), whose rules are root ::= ..., not Lark") from None


def _check_grammar(text: str, budget: regex.Budget) -> str:
    """Bounds the repeats; everything else is xgrammar's to check."""
    for repeat in re.finditer(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}", text):
        most = max(int(number[:9] or 0) for number in repeat.groups(""))
        if most > regex.MAX_REPEAT:
            raise ValueError(f"it repeats {most} times; {regex.MAX_REPEAT} are allowed")
        budget.take((text, repeat.start()), min(most, regex.UNROLLED))
    return text


def _tag(format: Any) -> str:
    return json.dumps({"type": "structural_tag", "format": format}, ensure_ascii=False)


def _read_tag(text: str) -> str:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise SchemaError("it is not valid JSON") from None
    if not isinstance(given, Mapping) or set(given) != {"type", "format"} or given["type"] != "structural_tag":
        raise SchemaError('it must be {"type": "structural_tag", "format": ...}')
    return _tag(_TagReader().format(given["format"], "format", 0))


class _TagReader:
    """Checks a structural tag's formats and rewrites the schemas and regular expressions in them."""

    def __init__(self) -> None:
        self._num_parts, self._budget = 0, regex.Budget()

    def format(self, given: Any, place: str, depth: int) -> dict[str, Any]:
        self._num_parts += 1
        if depth > MAX_TAG_DEPTH or self._num_parts > MAX_TAG_PARTS:
            raise SchemaError(f"it is too large: {MAX_TAG_PARTS} parts and a depth of {MAX_TAG_DEPTH} are allowed")
        kind = given.get("type") if isinstance(given, Mapping) else None
        if not isinstance(kind, str) or kind not in _TAG_FIELDS:
            raise SchemaError(f"{place} must be an object whose type is one of {', '.join(_TAG_FIELDS)}")
        unknown = sorted(set(given) - _TAG_FIELDS[kind] - {"type"})
        if unknown:
            raise SchemaError(f"the field {unknown[0]!r} of {kind} is not supported (at {place})")
        read: dict[str, Callable[[Any, str, int], Any]] = {
            "content": self.format,
            "elements": self._formats,
            "tags": self._tags,
            "json_schema": lambda value, place, depth: rewrite_schema(value, self._budget),
            "style": self._style,
            "pattern": self._pattern,
            "grammar": lambda value, place, depth: _check_grammar(self._text(value, place, depth), self._budget),
            "min": self._count,
            "max": self._count,
            "begin": self._text,
            "value": self._text,
        }
        copy = {key: read[key](value, f"{place}.{key}", depth + 1) if key in read else value for key, value in given.items()}
        return {**copy, "max_whitespace_cnt": MAX_TAG_WHITESPACE} if kind == "json_schema" else copy

    def _formats(self, given: Any, place: str, depth: int) -> list[dict[str, Any]]:
        if not isinstance(given, list) or not given:
            raise SchemaError(f"{place} must be a list of formats")
        return [self.format(value, f"{place}[{i}]", depth) for i, value in enumerate(given)]

    def _tags(self, given: Any, place: str, depth: int) -> list[dict[str, Any]]:
        tags = self._formats([{"type": "tag", **tag} if isinstance(tag, Mapping) else tag for tag in _list(given)], place, depth)
        if any(tag["type"] != "tag" for tag in tags):
            raise SchemaError(f"{place} must be a list of tags")
        return tags

    def _style(self, given: Any, place: str, depth: int) -> str:
        if given != "json":
            raise SchemaError(f'{place} is {given!r}; only "json" is supported')
        return "json"

    def _pattern(self, given: Any, place: str, depth: int) -> str:
        return regex.rewrite(self._text(given, place, depth), self._budget)

    def _text(self, given: Any, place: str, depth: int) -> str:
        if not isinstance(given, str):
            raise SchemaError(f"{place} must be a text")
        return given

    def _count(self, given: Any, place: str, depth: int) -> int:
        if not isinstance(given, int) or isinstance(given, bool) or not -1 <= given <= MAX_TAG_REPEAT:
            raise SchemaError(f"{place} is {given!r}; expected a whole number up to {MAX_TAG_REPEAT}")
        return given


def _list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else []


def _reason(error: Exception) -> str:
    """The message without xgrammar's time and source line."""
    text = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error)).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
