"""From an expression with anchors and lookaheads anywhere to the language of the texts that it fits (automaton.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlserve.structured import characters
from vlserve.structured.automaton import Languages, Node
from vlserve.structured.characters import complement, intersection
from vlserve.structured.regex_syntax import Syntax, looks, looks_back, parts, refuse, sre

MAX_UNROLLED_LOOKS = 16  # repeats of what has an anchor or a lookahead in it
# how the text before a place ends: nothing is before, a letter, digit or underscore, or something else
BEGIN, WORD, OTHER = "begin", "word", "other"
_After = Callable[[str], Node]


class LanguageReader(Syntax):
    """From Python's tree to a language of whole texts, each item together with all that may follow it."""

    def __init__(self, languages: Languages, in_json: bool) -> None:
        super().__init__(in_json)
        self._of, self._splits = languages, False
        self._word = languages.one_of(characters.WORD)
        self._no_word = languages.one_of(complement(characters.WORD))

    def language(self, items: Sequence[Any]) -> Node:
        of = self._of
        self._splits = looks_back(items)
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
        if not looks([(kind, value)]):
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
        raise refuse(kind)

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
        raise refuse(kind)

    def _plain_items(self, items: Sequence[Any]) -> Node:
        node = self._of.empty
        for item in reversed(items):
            node = self._of.cat(self._plain(*item), node)
        return node


def _has_boundary(items: Sequence[Any]) -> bool:
    boundaries = (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY)
    return any((kind is sre.AT and value in boundaries) or any(map(_has_boundary, parts(kind, value))) for kind, value in items)
