"""Sets of characters as ranges of code points, and how they are written for xgrammar.

`\\d`, `\\w`, `\\s` mean ASCII to some readers of regular expressions and Unicode to others. A narrow set holds what all
of them agree on, a wide one what any of them has: what is written from narrow sets is right for everyone.
"""

from __future__ import annotations

import itertools
import sys
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
else:
    import sre_constants as sre

Ranges = list[tuple[int, int]]  # code points, sorted, apart from one another
LAST = 0x10FFFF
TEXT: Ranges = [(0, 0xD7FF), (0xE000, LAST)]
IN_JSON: Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, LAST)]  # what JSON need not escape
WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]

_NARROW: dict[Any, Ranges] = {
    sre.CATEGORY_DIGIT: [(0x30, 0x39)],
    sre.CATEGORY_SPACE: [(0x09, 0x0D), (0x20, 0x20)],
    sre.CATEGORY_WORD: WORD,
}
_NEGATED = {
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
}
# what Unicode has in each class, as a set of categories (the last two of words may yet become letters) and by itself
_WIDE: dict[Any, tuple[str, str]] = {
    sre.CATEGORY_DIGIT: ("Nd", ""),
    sre.CATEGORY_SPACE: ("Zs Zl Zp", "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\ufeff"),
    sre.CATEGORY_WORD: ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Cn Co", "\u200c\u200d"),
}
# beside its other case, what Unicode takes for the same letter
_ALIKE = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}


def category(name: Any, *, narrow: bool) -> Ranges:
    """A class such as \\d or \\D of Python's parser."""
    if name in _NEGATED:
        return complement(category(_NEGATED[name], narrow=not narrow))
    return _NARROW[name] if narrow else _wide(name)


@lru_cache
def _wide(name: Any) -> Ranges:
    categories, more = _WIDE[name]
    wanted, ranges, begin = set(categories.split()), [(ord(c), ord(c)) for c in more], 0
    for category, run in itertools.groupby(map(unicodedata.category, map(chr, range(LAST + 1)))):
        end = begin + sum(1 for _ in run)
        ranges += [(begin, end - 1)] if category in wanted else []
        begin = end
    return merged(ranges)


def any_case(ranges: Ranges, *, narrow: bool) -> Ranges:
    """Also the other case of ASCII letters; ValueError when others are in it."""
    if ranges and ranges[-1][1] >= 0x80:
        raise ValueError("(?i) is supported for ASCII letters only; write both cases, as in [\u00e9\u00c9]")
    found = list(ranges)
    for low, high in ranges:
        for letter in filter(str.isalpha, map(chr, range(low, high + 1))):
            others = letter.swapcase() + ("" if narrow else _ALIKE.get(letter.lower(), ""))
            found += [(ord(c), ord(c)) for c in others]
    return merged(found)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    joined: Ranges = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    gaps: Ranges = []
    begin = 0
    for low, high in merged(ranges):
        if low > begin:
            gaps.append((begin, low - 1))
        begin = high + 1
    return [*gaps, (begin, LAST)] if begin <= LAST else gaps


def intersection(a: Ranges, b: Ranges) -> Ranges:
    return complement(complement(a) + complement(b))


def written(ranges: Ranges) -> str:
    """A set that is not empty, as xgrammar reads it."""
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _character(ranges[0][0])
    left_out = complement(ranges)
    if all(high < 0x80 or (low, high) == (0xD800, 0xDFFF) for low, high in left_out):
        inside = _class([r for r in left_out if r[1] < 0x80])
        return f"[^{inside}]" if inside else "[\\u0000-\\u{10ffff}]"
    return f"[{_class(ranges)}]"


def _class(ranges: Ranges) -> str:
    """Control characters last: xgrammar writes them down as \\x1, which a hexadecimal digit must not follow.

    Nor may ^ be the first, even as an escape: the class would be read as a negated one.
    """
    ordered = sorted(ranges, key=lambda r: (r[0] < 0x20, r))
    first = _character(ordered[-1][1]) if ordered and ordered[0][0] == ord("^") else ""
    return first + "".join(_range(*r) for r in ordered)


def _range(low: int, high: int) -> str:
    return _character(low) if low == high else f"{_character(low)}-{_character(high)}"


def _character(code: int) -> str:
    """A letter or digit, or an escape of fixed length: xgrammar reads \\x2dcd as one character."""
    if code < 0x80 and chr(code).isalnum():
        return chr(code)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\u{{{code:x}}}"
