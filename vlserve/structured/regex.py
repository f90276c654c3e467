"""Regular expressions for constrained answers: checked, bounded, and rewritten with the few constructs that mean one thing.

xgrammar reads regular expressions, but passes over what it does not know (lookahead, anchors inside) and can let
a quote into a JSON string. `rewrite` parses with Python's own parser and writes literals, character sets, groups and
repeats only. Lookahead, word boundaries and anchors anywhere are worked in, and so are several expressions that hold at
once (automaton.py). `\\d`, `\\w` and `\\s` are ASCII, and their opposites leave out what Unicode counts among them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from vlserve.structured import characters
from vlserve.structured.automaton import Languages, Work
from vlserve.structured.characters import Ranges, complement, intersection
from vlserve.structured.regex_language import LanguageReader
from vlserve.structured.regex_syntax import TOO_DEEP, Syntax, looks, parse, parser, refuse, sre, translated

MAX_STATES = 1024
MAX_REPEAT, MAX_REPEAT_IN_JSON = 65536, 128
UNROLLED = 128  # xgrammar counts longer repeats instead of writing them out


class Budget:
    """States of the automata of one request, estimated: each costs a look at the whole vocabulary. And the work to find them."""

    def __init__(self) -> None:
        self.work = Work()
        self._seen: set[Hashable] = set()
        self._num_states = 0

    def take(self, part: Hashable, num_states: int) -> None:
        """Count a part; equal ones are counted once. Raises ValueError when it is too much."""
        if part in self._seen:
            return
        self._seen.add(part)
        self._num_states += num_states
        if self._num_states > MAX_STATES:
            raise ValueError(
                f"its repeats and length limits come to {self._num_states} states, {MAX_STATES} are allowed; "
                "use smaller or fewer different ones"
            )


def rewrite(pattern: str, budget: Budget, *, in_json: bool = False) -> str:
    """The same expression in plain ASCII, for the whole text.

    With `in_json` it is a JSON schema's pattern: it may match anywhere in the string unless it is anchored, and
    characters that JSON would have to escape are left out. Raises ValueError with the reason.
    """
    items = parse(pattern)
    writer = _Writer(in_json)
    try:
        text = writer.whole(items, in_json, in_json)
        num_states = writer.num_states
    except _NeedsAutomaton:
        return _combined((pattern,), budget, in_json=in_json)
    budget.take(pattern, num_states)
    return text


def rewrite_all(patterns: Sequence[str], budget: Budget, *, least: int = 0, most: int | None = None) -> str:
    """One expression for JSON strings in which all patterns are found, of `least` to `most` characters.

    Raises ValueError with the reason.
    """
    unique = tuple(dict.fromkeys(patterns))
    if len(unique) == 1 and _has_length(unique[0], least, most):
        return rewrite(unique[0], budget, in_json=True)
    return _combined(unique, budget, in_json=True, least=least, most=most)


def _has_length(pattern: str, least: int, most: int | None) -> bool:
    """Whether the pattern itself keeps to the limits."""
    if not least and most is None:
        return True
    items = parse(pattern)
    shortest, longest = parser.parse(translated(pattern)).getwidth()
    is_whole = items[:1] == [(sre.AT, sre.AT_BEGINNING)] and items[-1:] == [(sre.AT, sre.AT_END)]
    return is_whole and least <= shortest and (most is None or longest <= most)


def finds(pattern: str, text: str, budget: Budget) -> bool:
    """Whether a JSON schema's pattern is found in a text; raises ValueError where it cannot be read.

    Python's own search takes exponential time for some, and nothing else runs meanwhile.
    """
    try:
        languages = Languages(characters.TEXT, budget.work)
        return languages.holds(LanguageReader(languages, in_json=True).language(parse(pattern)), text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _combined(patterns: Sequence[str], budget: Budget, *, in_json: bool, least: int = 0, most: int | None = None) -> str:
    """By an automaton, unless one of the patterns alone says it all."""
    try:
        languages = Languages(characters.IN_JSON if in_json else characters.TEXT, budget.work)
        parts = [LanguageReader(languages, in_json).language(parse(pattern)) for pattern in patterns]
        if least or most is not None:
            parts.append(languages.repeat(languages.any, least, most))
        for pattern, part in zip(patterns, parts, strict=False):
            others = languages.both(*(p for p in parts if p != part))
            if len(parts) > 1 and languages.automaton(languages.both(part, languages.other(others))).is_empty:
                return rewrite(pattern, budget, in_json=in_json)
        automaton = languages.automaton(languages.both(*parts))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if automaton.is_empty:
        raise NoTextFits("no text fits it")
    text, num_sets = automaton.expression()
    budget.take(text, num_sets)
    return text


class NoTextFits(ValueError):
    """An expression that no text satisfies."""


class _NeedsAutomaton(Exception):
    """It has more than anchors at its ends."""


class _Writer(Syntax):
    """From Python's tree straight to an expression: anchors at the ends only."""

    def __init__(self, in_json: bool) -> None:
        super().__init__(in_json)
        self._allowed = characters.IN_JSON if in_json else characters.TEXT
        self._max_repeat = MAX_REPEAT_IN_JSON if in_json else MAX_REPEAT
        self._copies = 1  # how often what is being written will be written out
        self.num_states = 0

    def whole(self, items: Sequence[Any], before: bool, after: bool) -> str:
        """`before`: anything may come before, unless it begins with an anchor; `after` likewise at the end."""
        if items and items[0] == (sre.AT, sre.AT_BEGINNING):
            items, before = items[1:], False
        if items and items[-1] == (sre.AT, sre.AT_END):
            items, after = items[:-1], False
        if len(items) == 1 and items[0][0] is sre.SUBPATTERN:
            return f"({self._inside(items[0][1], lambda inside: self.whole(inside, before, after))})"
        if len(items) == 1 and items[0][0] is sre.BRANCH:
            return f"({'|'.join(self.whole(list(arm), before, after) for arm in items[0][1][1])})"
        if looks(items):
            raise _NeedsAutomaton
        anything = f"{self._set(complement([]))}*" if before or after else ""
        return anything * before + self._sequence(items) + anything * after

    def _sequence(self, items: Sequence[Any]) -> str:
        return "".join(self._item(*item) for item in items)

    def _item(self, kind: Any, value: Any) -> str:
        if kind is sre.BRANCH:
            return f"({'|'.join(self._sequence(list(arm)) for arm in value[1])})"
        if kind is sre.SUBPATTERN:
            return f"({self._inside(value, self._sequence)})"
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeat(*value)
        if kind in (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY):
            return self._set(self._ranges(kind, value))
        raise refuse(kind)

    def _repeat(self, low: int, high: int, inside: Any) -> str:
        bounded = high is not sre.MAXREPEAT
        most = int(high) if bounded else low
        if most > self._max_repeat:
            raise ValueError(f"it repeats {most} times; {self._max_repeat} are allowed")
        copies, self._copies = self._copies, self._copies * max(1, min(most, UNROLLED))
        text = f"({self._sequence(list(inside))})"
        self._copies = copies
        if not bounded:
            return text + {0: "*", 1: "+"}.get(low, f"{{{low},}}")
        return f"{text}{{{low},{most}}}"  # never ?, which xgrammar reads wrongly behind a repeat within strings

    def _set(self, ranges: Ranges) -> str:
        self.num_states += self._copies
        kept = intersection(ranges, self._allowed)
        if not kept:
            raise ValueError("it asks for a character that cannot come, such as a quote within a JSON string")
        return characters.written(kept)
