"""How a regular expression is read: Python's own parser, the flags and sets of characters that are taken, and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vlserve.structured import characters
from vlserve.structured.characters import Ranges, complement, merged

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as sre
    import sre_parse as parser

__all__ = ("TOO_DEEP", "Syntax", "check_flags", "looks", "looks_back", "parse", "parser", "parts", "refuse", "sre", "translated")
TOO_DEEP = "its groups or repeats are nested too deeply"
_FLAGS = int(sre.SRE_FLAG_IGNORECASE | sre.SRE_FLAG_DOTALL)
_HARMLESS_FLAGS = int(sre.SRE_FLAG_UNICODE | sre.SRE_FLAG_ASCII | sre.SRE_FLAG_VERBOSE)
_NOT_SUPPORTED = {
    "GROUPREF": "backreferences are not supported; write the texts out that may come twice, as in (aa|bb)",
    "GROUPREF_EXISTS": "conditional groups are not supported; write both alternatives out",
    "ATOMIC_GROUP": "atomic groups are not supported; use (?:...)",
    "POSSESSIVE_REPEAT": "possessive repeats are not supported; use *, + or ? alone",
}
# what JavaScript, Rust and PCRE write otherwise than Python: escapes and classes stay, groups get Python's spelling
_FOREIGN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*(?:\]|\\?\Z)|\(\?<(?=[A-Za-z_])", re.DOTALL)


def parse(pattern: str) -> list[Any]:
    try:
        tree = parser.parse(translated(pattern))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except (re.error, FutureWarning, ValueError, OverflowError) as error:
        raise ValueError(f"{error}{_hint(str(error))}") from None
    flags = int(tree.state.flags)
    check_flags(flags)
    return [(sre.SUBPATTERN, (None, flags & _FLAGS, 0, list(tree)))] if flags & _FLAGS else list(tree)


def translated(pattern: str) -> str:
    return _FOREIGN.sub(lambda match: "(?P<" if match[0] == "(?<" else match[0], pattern)


def _hint(error: str) -> str:
    if r"bad escape \p" in error or r"bad escape \P" in error:
        return "; write the characters as a class, such as [A-Za-z\u00c0-\u024f]"
    return "; Python's syntax is meant" if "bad escape" in error or "unknown extension" in error else ""


def check_flags(flags: int) -> None:
    if flags & int(sre.SRE_FLAG_MULTILINE):
        raise ValueError(r"the flag (?m) is not supported; write \n where a line begins or ends")
    if flags & ~(_FLAGS | _HARMLESS_FLAGS):
        raise ValueError("this flag is not supported; (?i), (?s), (?x), (?a) and (?u) are")


def looks(items: Sequence[Any]) -> bool:
    """Whether anchors or lookarounds are in it."""
    return any(kind in (sre.AT, sre.ASSERT, sre.ASSERT_NOT) or any(map(looks, parts(kind, value))) for kind, value in items)


def looks_back(items: Sequence[Any]) -> bool:
    """Whether it has anchors that depend on what came before."""
    ends = (sre.AT_END, sre.AT_END_STRING)
    return any((kind is sre.AT and value not in ends) or any(map(looks_back, parts(kind, value))) for kind, value in items)


def parts(kind: Any, value: Any) -> list[Sequence[Any]]:
    """What is nested in an item."""
    if kind is sre.BRANCH:
        return [list(arm) for arm in value[1]]
    if kind is sre.SUBPATTERN:
        return [list(value[3])]
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        return [list(value[2])]
    return [list(value[1])] if kind in (sre.ASSERT, sre.ASSERT_NOT) else []


class Syntax:
    """Flags and sets of characters, the same for both ways to read an expression."""

    def __init__(self, in_json: bool) -> None:
        self._in_json, self._flags, self._narrow = in_json, 0, True

    def _inside(self, group: Any, read: Callable[[Sequence[Any]], Any]) -> Any:
        """What `read` makes of a group's items under the group's flags."""
        _, added, removed, items = group
        check_flags(int(added))
        old, self._flags = self._flags, (self._flags | int(added)) & ~int(removed)
        try:
            return read(list(items))
        finally:
            self._flags = old

    def _ranges(self, kind: Any, value: Any) -> Ranges:
        return self._read_set(kind, value, self._narrow)

    def _read_set(self, kind: Any, value: Any, narrow: bool) -> Ranges:
        if kind is sre.NOT_LITERAL:
            return complement(self._letters([(value, value)], not narrow))
        if kind is sre.LITERAL:
            return self._letters([(value, value)], narrow)
        if kind is sre.ANY:
            if self._flags & int(sre.SRE_FLAG_DOTALL):
                return complement([])
            ends = [(0x0A, 0x0A)]
            return complement([*ends, (0x0D, 0x0D), (0x2028, 0x2029)] if narrow and self._in_json else ends)
        negated = value[0][0] is sre.NEGATE
        found: Ranges = []
        for member, what in value[1:] if negated else value:
            if member is sre.CATEGORY:
                found += characters.category(what, narrow=narrow != negated)
            else:
                found += self._letters([(what, what) if member is sre.LITERAL else what], narrow != negated)
        return complement(found) if negated else merged(found)

    def _letters(self, ranges: Ranges, narrow: bool) -> Ranges:
        return characters.any_case(ranges, narrow=narrow) if self._flags & int(sre.SRE_FLAG_IGNORECASE) else ranges


def refuse(kind: Any) -> ValueError:
    return ValueError(_NOT_SUPPORTED.get(str(kind), f"{str(kind).lower().replace('_', ' ')} is not supported"))
