"""Languages of texts with intersection and complement, which xgrammar's expressions lack, and back to an expression.

Languages are built as nodes; a node's derivative by a character is what may follow it (Brzozowski). From the derivatives
comes a deterministic automaton, from that, with its states removed one by one, an expression without either operation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlserve.structured.characters import LAST, Ranges, intersection, merged, written

MAX_AUTOMATON, MAX_SETS, MAX_WRITTEN = 1024, 4096, 100_000
MAX_WORK = 2_000_000  # small steps, some seconds
_FIRST = 0xF0000  # while an expression is being made, each set is one character, from this one on
TOO_LARGE = "it needs too large an automaton; use shorter repeats or length limits, or fewer lookaheads"

Node = int
_Edges = dict[int, dict[int, str]]  # from state to state, the expression that leads there


class Work:
    """Small steps that one request has taken."""

    def __init__(self) -> None:
        self._num_steps = 0

    def spend(self, num_steps: int) -> None:
        """Raises ValueError once there are too many."""
        self._num_steps += num_steps
        if self._num_steps > MAX_WORK:
            raise ValueError(TOO_LARGE)


class Languages:
    """Nodes, each made once, over texts of the characters of `alphabet`.

    A node is a tuple: ("set", ranges), ("cat", a, b), ("or", nodes), ("and", nodes), ("not", a), ("repeat", a, low, high),
    ("loop", number), whose body comes later, ("none",) or ("empty",).
    """

    def __init__(self, alphabet: Ranges, work: Work) -> None:
        self._work = work
        self._nodes: list[tuple[Any, ...]] = []
        self._ids: dict[tuple[Any, ...], Node] = {}
        self._nullable: dict[Node, bool] = {}
        self._bodies: dict[Node, Node] = {}
        self._alphabet = alphabet
        self._derived: dict[tuple[Node, int], Node] = {}
        self.none, self.empty = self._make("none"), self._make("empty")
        self.any = self._make("set", tuple(alphabet))
        self.all = self._make("repeat", self.any, 0, None)

    def _make(self, *node: Any) -> Node:
        if node not in self._ids:
            self._ids[node] = len(self._nodes)
            self._nodes.append(node)
        return self._ids[node]

    def one_of(self, ranges: Ranges) -> Node:
        kept = intersection(ranges, self._alphabet)
        return self._make("set", tuple(kept)) if kept else self.none

    def cat(self, a: Node, b: Node) -> Node:
        if self.none in (a, b):
            return self.none
        if self.empty in (a, b):
            return b if a == self.empty else a
        if a == b == self.all:
            return a
        self._work.spend(1)
        if self._nodes[a][0] == "cat":
            _, first, second = self._nodes[a]
            return self.cat(first, self.cat(second, b))
        return self._make("cat", a, b)

    def either(self, *given: Node) -> Node:
        nodes = self._flat("or", given) - {self.none}
        if self.all in nodes:
            return self.all
        return next(iter(nodes), self.none) if len(nodes) < 2 else self._make("or", frozenset(nodes))

    def both(self, *given: Node) -> Node:
        nodes = self._flat("and", given) - {self.all}
        if self.none in nodes or any(self.other(node) in nodes for node in nodes):
            return self.none
        return next(iter(nodes), self.all) if len(nodes) < 2 else self._make("and", frozenset(nodes))

    def other(self, a: Node) -> Node:
        """All texts that are not in it."""
        if a in (self.none, self.all):
            return self.all if a == self.none else self.none
        return self._nodes[a][1] if self._nodes[a][0] == "not" else self._make("not", a)

    def repeat(self, a: Node, low: int, high: int | None) -> Node:
        if high == 0 or a in (self.none, self.empty):
            return self.none if a == self.none and low else self.empty
        if self.nullable(a):
            low = 0
        return a if (low, high) == (1, 1) else self._make("repeat", a, low, high)

    def loop(self) -> Node:
        """A node that may occur in its own body, behind at least one character; `close` tells the body."""
        return self._make("loop", len(self._nodes))

    def close(self, loop: Node, body: Node) -> None:
        self._bodies[loop] = body

    def _flat(self, kind: str, given: Iterable[Node]) -> set[Node]:
        found: set[Node] = set()
        for node in given:
            found |= self._nodes[node][1] if self._nodes[node][0] == kind else {node}
            self._work.spend(1)
        self._work.spend(len(found))
        return found

    def nullable(self, node: Node) -> bool:
        """Whether the empty text is in it."""
        if node not in self._nullable:
            kind, *parts = self._nodes[node]
            self._nullable[node] = self._is_nullable(node, str(kind), parts)
        return self._nullable[node]

    def _is_nullable(self, node: Node, kind: str, parts: list[Any]) -> bool:
        if kind in ("cat", "or", "and"):
            inside = parts[0] if kind != "cat" else parts
            results = map(self.nullable, inside)
            return any(results) if kind == "or" else all(results)
        if kind == "not":
            return not self.nullable(parts[0])
        if kind == "loop":
            return self.nullable(self._bodies[node])
        return kind == "empty" or (kind == "repeat" and parts[1] == 0)

    def _derivative(self, node: Node, code: int) -> Node:
        """What may follow in texts of `node` that begin with a character."""
        if (node, code) not in self._derived:
            self._derived[node, code] = self._derive(node, code, *self._nodes[node])
        return self._derived[node, code]

    def _derive(self, node: Node, code: int, kind: str, *parts: Any) -> Node:
        if kind == "set":
            self._work.spend(1 + len(parts[0]) // 8)
            return self.empty if any(low <= code <= high for low, high in parts[0]) else self.none
        if kind == "cat":
            first, second = parts
            after = self.cat(self._derivative(first, code), second)
            return self.either(after, self._derivative(second, code)) if self.nullable(first) else after
        if kind in ("or", "and"):
            inside = [self._derivative(part, code) for part in parts[0]]
            return self.either(*inside) if kind == "or" else self.both(*inside)
        if kind == "not":
            return self.other(self._derivative(parts[0], code))
        if kind == "repeat":
            inner, low, high = parts
            rest = self.repeat(inner, max(0, low - 1), None if high is None else high - 1)
            return self.cat(self._derivative(inner, code), rest)
        return self._derivative(self._bodies[node], code) if kind == "loop" else self.none

    def automaton(self, root: Node) -> Automaton:
        """Its states and transitions; ValueError when there are too many."""
        classes = self._classes()
        states, found, edges = {root: 0}, [root], []
        for node in found:
            row = []
            self._work.spend(len(classes))
            for ranges in classes:
                after = self._derivative(node, ranges[0][0])
                if after not in states:
                    if len(found) >= MAX_AUTOMATON:
                        raise ValueError(TOO_LARGE)
                    states[after] = len(found)
                    found.append(after)
                row.append(states[after])
            edges.append(row)
        return Automaton(classes, edges, [self.nullable(node) for node in found], self._work)

    def holds(self, node: Node, text: str) -> bool:
        """Whether a text is in it."""
        for character in text:
            node = self._derivative(node, ord(character))
        return self.nullable(node)

    def _classes(self) -> list[Ranges]:
        """The alphabet in parts whose characters are in the same sets, so that they lead to the same states."""
        sets = [node[1] for node in self._nodes if node[0] == "set"]
        cuts: dict[int, set[int]] = {}  # the sets that begin or end at a character
        for number, ranges in enumerate(sets):
            for low, high in ranges:
                cuts.setdefault(low, set()).add(number)
                cuts.setdefault(high + 1, set()).add(number)
        classes: dict[frozenset[int], Ranges] = {}
        inside: frozenset[int] = frozenset()
        begins = sorted(cuts)
        for low, after in zip(begins, [*begins[1:], LAST + 1], strict=True):
            inside ^= cuts[low]
            if inside and low <= LAST:
                classes.setdefault(inside, []).append((low, after - 1))
        return list(classes.values())


class Automaton:
    """Deterministic: edges[s][c] is where characters of class c lead from state s; it begins in state 0."""

    def __init__(self, classes: list[Ranges], edges: list[list[int]], ends: list[bool], work: Work) -> None:
        self._classes, self._edges, self._ends, self._work = classes, edges, ends, work

    @property
    def is_empty(self) -> bool:
        return not any(self._ends)

    def expression(self) -> tuple[str, int]:
        """It as an expression for a whole text, with the number of character sets in it; ValueError when it is too long."""
        states, ends, sets = self._minimal()
        begin, end = -1, -2
        edges: _Edges = {begin: {0: ""}, end: {}} | states
        for state in ends:
            edges[state][end] = ""
        while len(edges) > 2:
            self._work.spend(len(edges) ** 2 // 8)
            removed = min((s for s in edges if s >= 0), key=lambda s: _cost(edges, s))
            _remove(edges, removed)
        text = edges[begin][end].translate({_FIRST + number: text for text, number in sets.items()})
        if len(text) > MAX_WRITTEN:
            raise ValueError(TOO_LARGE)
        return text, sum(ord(c) >= _FIRST for c in edges[begin][end])

    def _minimal(self) -> tuple[_Edges, list[int], dict[str, int]]:
        """Equal states merged, states without a way to the end left out; sets of characters as one each."""
        blocks = [int(end) for end in self._ends]
        while True:
            numbers: dict[tuple[int, ...], int] = {}
            self._work.spend(len(self._edges) * len(self._classes) // 8)
            refined = [
                numbers.setdefault((blocks[s], *(blocks[t] for t in row)), len(numbers)) for s, row in enumerate(self._edges)
            ]
            if len(numbers) == len(set(blocks)):
                break
            blocks = refined
        order = {block: i for i, block in enumerate(dict.fromkeys(blocks))}  # state 0 first
        names = [order[block] for block in blocks]
        sets: dict[int, dict[int, Ranges]] = {}
        for state, row in enumerate(self._edges):
            if names[state] not in sets:
                found = sets[names[state]] = {}
                for ranges, target in zip(self._classes, row, strict=True):
                    found.setdefault(names[target], []).extend(ranges)
        ends = {names[state] for state, end in enumerate(self._ends) if end}
        alive, before = set(ends), 0
        while len(alive) > before:
            before = len(alive)
            alive |= {s for s, row in sets.items() if alive & set(row)}
        numbered: dict[str, int] = {}  # what is written for each set
        kept: _Edges = {state: {} for state in sets if state in alive}
        for state, ways in kept.items():
            for target in alive & set(sets[state]):
                number = numbered.setdefault(written(merged(sets[state][target])), len(numbered))
                ways[target] = chr(_FIRST + number)
        return kept, sorted(ends), numbered


def _cost(edges: _Edges, state: int) -> tuple[int, int]:
    """How much text removing a state makes; of equal ones, those far from the beginning go first."""
    before = [row[state] for source, row in edges.items() if state in row and source != state]
    after = [text for target, text in edges[state].items() if target != state]
    around = len(edges[state].get(state, ""))
    size = sum(map(len, before)) * (len(after) - 1) + sum(map(len, after)) * (len(before) - 1)
    return size + around * (len(before) * len(after) - 1), -state


def _remove(edges: _Edges, state: int) -> None:
    """Lead all ways through a state around it."""
    row = edges.pop(state)
    loop = row.pop(state, "")
    around = f"({loop})*" if loop else ""
    for others in edges.values():
        before = others.pop(state, None)
        for target, after in row.items() if before is not None else ():
            way = f"{before}{around}{after}"
            old = others.get(target)
            others[target] = way if old is None or old == way else _optional(old, way)
            if len(others[target]) > MAX_SETS:
                raise ValueError(TOO_LARGE)


def _optional(a: str, b: str) -> str:
    """One of two ways; an empty one makes the other optional."""
    if a and b:
        return f"({a}|{b})"
    return f"({a or b}){{0,1}}"
