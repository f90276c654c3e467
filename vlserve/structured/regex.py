"""Regular expressions for constrained answers: checked, bounded, and rewritten with the few constructs that mean one thing.

xgrammar reads regular expressions, but passes over what it does not know (lookahead, anchors inside) and can let
a quote into a JSON string. `rewrite` parses with Python's own parser and writes literals, character sets, groups and
repeats only; everything else is refused. `\\d`, `\\w` and `\\s` are ASCII, and a dot is any character but a newline.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as sre
    import sre_parse as parser

MAX_STATES = 1024
MAX_REPEAT, MAX_REPEAT_IN_JSON = 65536, 128
UNROLLED = 128  # xgrammar counts longer repeats instead of writing them out

Ranges = list[tuple[int, int]]  # code points, sorted, apart from one another
_CATEGORIES: dict[Any, Ranges] = {
    sre.CATEGORY_DIGIT: [(0x30, 0x39)],
    sre.CATEGORY_SPACE: [(0x09, 0x0D), (0x20, 0x20)],
    sre.CATEGORY_WORD: [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
}
_NEGATED = {
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
}
_ALLOWED: Ranges = [(0, 0xD7FF), (0xE000, 0x10FFFF)]
_ALLOWED_IN_JSON: Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF)]


class Budget:
    """States of the automata of one request, estimated: each costs a look at the whole vocabulary."""

    def __init__(self) -> None:
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
    try:
        tree = parser.parse(pattern)
    except RecursionError:
        raise ValueError("its groups are nested too deeply") from None
    except (re.error, FutureWarning, ValueError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if tree.state.flags & ~int(sre.SRE_FLAG_UNICODE):
        raise ValueError("flags such as (?i) are not supported")
    writer = _Writer(in_json)
    text = writer.sequence(list(tree), first=True, last=True)
    budget.take(pattern, writer.num_states)
    return text


class _Writer:
    def __init__(self, in_json: bool) -> None:
        self._search = in_json
        self._allowed = _ALLOWED_IN_JSON if in_json else _ALLOWED
        self._max_repeat = MAX_REPEAT_IN_JSON if in_json else MAX_REPEAT
        self._copies = 1  # how often what is being written will be written out
        self.num_states = 0

    def sequence(self, items: Sequence[Any], *, first: bool = False, last: bool = False) -> str:
        """`first`: nothing comes before, so that it may begin with an anchor; `last` likewise at the end."""
        begin, end = "", ""
        if first and items and items[0] == (sre.AT, sre.AT_BEGINNING):
            items = items[1:]
        elif first and self._search and not _is_group(items[:1]):
            begin = self._anything()
        if last and items and items[-1] == (sre.AT, sre.AT_END):
            items = items[:-1]
        elif last and self._search and not _is_group(items[-1:]):
            end = self._anything()
        final = len(items) - 1
        return begin + "".join(self._item(item, first and i == 0, last and i == final) for i, item in enumerate(items)) + end

    def _item(self, item: Any, first: bool, last: bool) -> str:
        kind, value = item
        if kind is sre.BRANCH:
            return f"({'|'.join(self.sequence(list(arm), first=first, last=last) for arm in value[1])})"
        if kind is sre.SUBPATTERN:
            _, add_flags, remove_flags, inside = value
            if add_flags or remove_flags:
                raise ValueError("flags such as (?i) are not supported")
            return f"({self.sequence(list(inside), first=first, last=last)})"
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeat(*value)
        if kind is sre.AT:
            raise ValueError("anchors are supported at the two ends only")
        if kind in (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY):
            return self._set(_ranges(kind, value))
        names = {sre.ASSERT: "lookaround", sre.ASSERT_NOT: "lookaround", sre.GROUPREF: "backreferences"}
        raise ValueError(f"{names.get(kind, str(kind).lower().replace('_', ' '))} is not supported")

    def _repeat(self, low: int, high: int, inside: Any) -> str:
        bounded = high is not sre.MAXREPEAT
        most = int(high) if bounded else low
        if most > self._max_repeat:
            raise ValueError(f"it repeats {most} times; {self._max_repeat} are allowed")
        copies, self._copies = self._copies, self._copies * max(1, min(most, UNROLLED))
        text = f"({self.sequence(list(inside))})"
        self._copies = copies
        if not bounded:
            return text + {0: "*", 1: "+"}.get(low, f"{{{low},}}")
        return text + ("?" if (low, most) == (0, 1) else f"{{{low},{most}}}")

    def _anything(self) -> str:
        return self._set(_complement([])) + "*"

    def _set(self, ranges: Ranges) -> str:
        self.num_states += self._copies
        kept = _intersection(ranges, self._allowed)
        if not kept:
            raise ValueError("it asks for a character that cannot come, such as a quote within a JSON string")
        if len(kept) == 1 and kept[0][0] == kept[0][1]:
            return _character(kept[0][0])
        left_out = _complement(kept)
        if all(high < 0x80 or (low, high) == (0xD800, 0xDFFF) for low, high in left_out):
            inside = _class([r for r in left_out if r[1] < 0x80])
            return f"[^{inside}]" if inside else "[\\u0000-\\u{10ffff}]"
        # a class that begins with ^ would be read as a negated one, even where it is written as an escape
        begin = _character(kept[-1][1]) if kept[0][0] == ord("^") else ""
        return f"[{begin}{_class(kept)}]"


def _is_group(items: Sequence[Any]) -> bool:
    return bool(items) and items[0][0] in (sre.BRANCH, sre.SUBPATTERN)


def _ranges(kind: Any, value: Any) -> Ranges:
    if kind is sre.LITERAL:
        return [(value, value)]
    if kind is sre.NOT_LITERAL:
        return _complement([(value, value)])
    if kind is sre.ANY:
        return _complement([(0x0A, 0x0A)])
    found: Ranges = []
    negated = False
    for member, what in value:
        if member is sre.NEGATE:
            negated = True
        elif member is sre.LITERAL:
            found.append((what, what))
        elif member is sre.RANGE:
            found.append(what)
        elif what in _CATEGORIES:
            found += _CATEGORIES[what]
        else:
            found += _complement(_CATEGORIES[_NEGATED[what]])
    return _complement(found) if negated else _merged(found)


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: Ranges = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    gaps: Ranges = []
    begin = 0
    for low, high in _merged(ranges):
        if low > begin:
            gaps.append((begin, low - 1))
        begin = high + 1
    return [*gaps, (begin, 0x10FFFF)] if begin <= 0x10FFFF else gaps


def _intersection(a: Ranges, b: Ranges) -> Ranges:
    return _complement(_complement(a) + _complement(b))


def _class(ranges: Ranges) -> str:
    """Control characters last: xgrammar writes them down as \\x1, which a hexadecimal digit must not follow."""
    return "".join(_range(*r) for r in sorted(ranges, key=lambda r: (r[0] < 0x20, r)))


def _range(low: int, high: int) -> str:
    return _character(low) if low == high else f"{_character(low)}-{_character(high)}"


def _character(code: int) -> str:
    """A letter or digit, or an escape of fixed length: xgrammar reads \\x2dcd as one character."""
    if code < 0x80 and chr(code).isalnum():
        return chr(code)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\u{{{code:x}}}"
