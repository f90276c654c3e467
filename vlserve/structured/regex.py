"""Regular expressions for constrained answers: checked, bounded, and rewritten with the few constructs that mean one thing.

xgrammar reads regular expressions, but passes over what it does not know (lookahead, anchors inside) and can let
a quote into a JSON string. `rewrite` parses with Python's own parser and writes literals, character sets, groups and
repeats only. Lookahead, word boundaries and anchors anywhere are worked in, and so are several expressions that hold at
once (automaton.py). `\\d`, `\\w` and `\\s` are ASCII, and their opposites leave out what Unicode counts among them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from vlserve.structured import characters
from vlserve.structured.automaton import Languages, Node, Work
from vlserve.structured.characters import Ranges, complement, intersection, merged

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as sre
    import sre_parse as parser

MAX_STATES = 1024
MAX_REPEAT, MAX_REPEAT_IN_JSON = 65536, 128
UNROLLED = 128  # xgrammar counts longer repeats instead of writing them out
TOO_DEEP = "its groups or repeats are nested too deeply"
MAX_UNROLLED_LOOKS = 16  # repeats of what has an anchor or a lookahead in it
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
    items = _parse(pattern)
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
    items = _parse(pattern)
    shortest, longest = parser.parse(_translated(pattern)).getwidth()
    is_whole = items[:1] == [(sre.AT, sre.AT_BEGINNING)] and items[-1:] == [(sre.AT, sre.AT_END)]
    return is_whole and least <= shortest and (most is None or longest <= most)


def finds(pattern: str, text: str, budget: Budget) -> bool:
    """Whether a JSON schema's pattern is found in a text; raises ValueError where it cannot be read.

    Python's own search takes exponential time for some, and nothing else runs meanwhile.
    """
    try:
        languages = Languages(characters.TEXT, budget.work)
        return languages.holds(_Reader(languages, in_json=True).language(_parse(pattern)), text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _combined(patterns: Sequence[str], budget: Budget, *, in_json: bool, least: int = 0, most: int | None = None) -> str:
    """By an automaton, unless one of the patterns alone says it all."""
    try:
        languages = Languages(characters.IN_JSON if in_json else characters.TEXT, budget.work)
        parts = [_Reader(languages, in_json).language(_parse(pattern)) for pattern in patterns]
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


def _parse(pattern: str) -> list[Any]:
    try:
        tree = parser.parse(_translated(pattern))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except (re.error, FutureWarning, ValueError, OverflowError) as error:
        raise ValueError(f"{error}{_hint(str(error))}") from None
    flags = int(tree.state.flags)
    _check_flags(flags)
    return [(sre.SUBPATTERN, (None, flags & _FLAGS, 0, list(tree)))] if flags & _FLAGS else list(tree)


def _translated(pattern: str) -> str:
    return _FOREIGN.sub(lambda match: "(?P<" if match[0] == "(?<" else match[0], pattern)


def _hint(error: str) -> str:
    if r"bad escape \p" in error or r"bad escape \P" in error:
        return "; write the characters as a class, such as [A-Za-z\u00c0-\u024f]"
    return "; Python's syntax is meant" if "bad escape" in error or "unknown extension" in error else ""


def _check_flags(flags: int) -> None:
    if flags & int(sre.SRE_FLAG_MULTILINE):
        raise ValueError(r"the flag (?m) is not supported; write \n where a line begins or ends")
    if flags & ~(_FLAGS | _HARMLESS_FLAGS):
        raise ValueError("this flag is not supported; (?i), (?s), (?x), (?a) and (?u) are")


def _looks(items: Sequence[Any]) -> bool:
    """Whether anchors or lookarounds are in it."""
    return any(kind in (sre.AT, sre.ASSERT, sre.ASSERT_NOT) or any(map(_looks, _parts(kind, value))) for kind, value in items)


def _looks_back(items: Sequence[Any]) -> bool:
    """Whether it has anchors that depend on what came before."""
    ends = (sre.AT_END, sre.AT_END_STRING)
    return any((kind is sre.AT and value not in ends) or any(map(_looks_back, _parts(kind, value))) for kind, value in items)


def _parts(kind: Any, value: Any) -> list[Sequence[Any]]:
    """What is nested in an item."""
    if kind is sre.BRANCH:
        return [list(arm) for arm in value[1]]
    if kind is sre.SUBPATTERN:
        return [list(value[3])]
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        return [list(value[2])]
    return [list(value[1])] if kind in (sre.ASSERT, sre.ASSERT_NOT) else []


class NoTextFits(ValueError):
    """An expression that no text satisfies."""


class _NeedsAutomaton(Exception):
    """It has more than anchors at its ends."""


class _Syntax:
    """Flags and sets of characters, the same for both ways to read an expression."""

    def __init__(self, in_json: bool) -> None:
        self._in_json, self._flags, self._narrow = in_json, 0, True

    def _inside(self, group: Any, read: Callable[[Sequence[Any]], Any]) -> Any:
        """What `read` makes of a group's items under the group's flags."""
        _, added, removed, items = group
        _check_flags(int(added))
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


def _refuse(kind: Any) -> ValueError:
    return ValueError(_NOT_SUPPORTED.get(str(kind), f"{str(kind).lower().replace('_', ' ')} is not supported"))


class _Writer(_Syntax):
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
        if _looks(items):
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
        raise _refuse(kind)

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


# how the text before a place ends: nothing is before, a letter, digit or underscore, or something else
BEGIN, WORD, OTHER = "begin", "word", "other"
_After = Callable[[str], Node]


class _Reader(_Syntax):
    """From Python's tree to a language of whole texts, each item together with all that may follow it."""

    def __init__(self, languages: Languages, in_json: bool) -> None:
        super().__init__(in_json)
        self._of, self._splits = languages, False
        self._word = languages.one_of(characters.WORD)
        self._no_word = languages.one_of(complement(characters.WORD))

    def language(self, items: Sequence[Any]) -> Node:
        of = self._of
        self._splits = _looks_back(items)
        if not self._in_json:
            return self._ascii(items, self._follow(items, lambda before: of.empty)(BEGIN))
        found = self._follow(items, lambda before: of.all)
        ways = [found(BEGIN)]
        if self._splits:
            ways += [of.cat(of.cat(of.all, end), found(name)) for name, end in ((WORD, self._word), (OTHER, self._no_word))]
        else:
            ways.append(of.cat(of.all, ways[0]))
        return self._ascii(items, of.either(*ways))

    def _ascii(self, items: Sequence[Any], language: Node) -> Node:
        """With \\b, without letters of other alphabets: some see a boundary beside them, some do not."""
        if not _has_boundary(items):
            return language
        words = characters.category(sre.CATEGORY_WORD, narrow=False)
        agreed = self._of.one_of(complement(intersection(words, complement(characters.WORD))))
        return self._of.both(language, self._of.repeat(agreed, 0, None))

    def _follow(self, items: Sequence[Any], after: _After) -> _After:
        """The items and what comes after them, for each way in which the text before may end."""
        for item in reversed(items):
            after = self._one(item, after)
        return after

    def _one(self, item: Any, after: _After) -> _After:
        known: dict[str, Node] = {}
        flags, narrow = self._flags, self._narrow  # as they are where the item stands

        def found(before: str) -> Node:
            if before not in known:
                saved, (self._flags, self._narrow) = (self._flags, self._narrow), (flags, narrow)
                try:
                    known[before] = self._item(item[0], item[1], after, before)
                finally:
                    self._flags, self._narrow = saved
            return known[before]

        return found

    def _item(self, kind: Any, value: Any, after: _After, before: str) -> Node:
        of = self._of
        if not _looks([(kind, value)]):
            return self._consumed(self._plain(kind, value), after, before)
        if kind is sre.AT:
            return self._anchor(value, after(before), before)
        if kind is sre.BRANCH:
            return of.either(*(self._follow(list(arm), after)(before) for arm in value[1]))
        if kind is sre.SUBPATTERN:
            return self._inside(value, lambda items: self._follow(items, after)(before))
        if kind in (sre.ASSERT, sre.ASSERT_NOT):
            return of.both(self._ahead(kind, value, before), after(before))
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeat(value, after, before)
        raise _refuse(kind)

    def _consumed(self, node: Node, after: _After, before: str) -> Node:
        of = self._of
        if not self._splits:
            return of.cat(node, after(before))
        ways = [after(before)] if of.nullable(node) else []
        for name, last in ((WORD, self._word), (OTHER, self._no_word)):
            part = of.both(node, of.cat(of.all, last))
            ways += [of.cat(part, after(name))]
        return of.either(*ways)

    def _anchor(self, which: Any, after: Node, before: str) -> Node:
        of = self._of
        if which in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return after if before == BEGIN else of.none
        if which in (sre.AT_END, sre.AT_END_STRING):
            line = of.one_of([(0x0A, 0x0A)]) if which is sre.AT_END else of.none  # Python's $ stands before a last one too
            return of.both(after, of.either(of.empty, line))
        word = of.cat(self._word, of.all)
        ways = of.other(word) if (which is sre.AT_BOUNDARY) == (before == WORD) else word
        if which is sre.AT_NON_BOUNDARY and before == BEGIN and self._narrow:
            ways = of.both(ways, of.other(of.empty))  # older Pythons see no \B in an empty text
        return of.both(after, ways)

    def _ahead(self, kind: Any, value: Any, before: str) -> Node:
        direction, items = value
        if direction < 0:
            raise ValueError("lookbehind is not supported; say in the expression itself what comes before")
        negated = kind is sre.ASSERT_NOT
        narrow, self._narrow = self._narrow, self._narrow != negated
        seen = self._follow(list(items), lambda _: self._of.all)(before)
        self._narrow = narrow
        return self._of.other(seen) if negated else seen

    def _repeat(self, value: Any, after: _After, before: str) -> Node:
        """Of something with an anchor or a lookahead in it."""
        low, high, items = value
        most = low if high is sre.MAXREPEAT else int(high)
        if most > MAX_UNROLLED_LOOKS:
            raise ValueError(f"anchors and lookaheads may repeat up to {MAX_UNROLLED_LOOKS} times, or without a bound")
        if high is sre.MAXREPEAT:
            if items.getwidth()[0] == 0:
                raise ValueError("an anchor or a lookahead in a repeat needs a character beside it, as in (?:(?!x).)*")
            after = self._forever(list(items), after)
        else:
            for _ in range(low, most):
                after = self._optional(self._follow(list(items), after), after)
        for _ in range(low):
            after = self._follow(list(items), after)
        return after(before)

    def _optional(self, item: _After, after: _After) -> _After:
        return lambda before: self._of.either(item(before), after(before))

    def _forever(self, items: Sequence[Any], after: _After) -> _After:
        loops: dict[str, Node] = {}

        def again(before: str) -> Node:
            if before not in loops:
                loops[before] = self._of.loop()
                self._of.close(loops[before], self._of.either(after(before), body(before)))
            return loops[before]

        body = self._follow(items, again)
        return again

    def _plain(self, kind: Any, value: Any) -> Node:
        """An item without anchors, alone."""
        of = self._of
        if kind is sre.BRANCH:
            return of.either(*(self._plain_items(list(arm)) for arm in value[1]))
        if kind is sre.SUBPATTERN:
            return self._inside(value, self._plain_items)
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, items = value
            return of.repeat(self._plain_items(list(items)), low, None if high is sre.MAXREPEAT else int(high))
        if kind in (sre.LITERAL, sre.NOT_LITERAL, sre.IN, sre.ANY):
            return of.one_of(self._ranges(kind, value))
        raise _refuse(kind)

    def _plain_items(self, items: Sequence[Any]) -> Node:
        node = self._of.empty
        for item in reversed(items):
            node = self._of.cat(self._plain(*item), node)
        return node


def _has_boundary(items: Sequence[Any]) -> bool:
    boundaries = (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY)
    return any((kind is sre.AT and value in boundaries) or any(map(_has_boundary, _parts(kind, value))) for kind, value in items)
