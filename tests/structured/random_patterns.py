"""Random regular expressions with texts, and what xgrammar takes of the rewritten ones against Python's `re`.

    python -m tests.structured.random_patterns 100000

compares that many pairs of a pattern and a text, both as a whole answer and within a JSON string.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import xgrammar

from vlserve.structured.regex import Budget, rewrite

# those after the space are words, spaces or digits to some readers of \w, \s and \d only, line ends to some readers of a dot
LETTERS, DISPUTED = "abcABC01_ -.]^+/xk\u2192\U0001f600", "\u00e9\u00c9\u00a0\u0663\u2028\u212a"
SETS = [
    "[abc]",
    "[^ab]",
    "[a-c0-9]",
    r"[\d_]",
    r"[^\w]",
    r"[\s\-]",
    r"[^\s.]",
    r"[\]^]",
    "[-+]",
    "[\u00e9\u2192]",
    r"[^\d]",
    r"[\W]",
    "[+-/]",
]
ESCAPES = [r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", r"\.", r"\/", r"\-", r"\]", r"\^", r"\+", r"\u0061", r"\x62", "\\\u2192"]
ANCHORS = ["^", "$", "^", "$", r"\b", r"\B", r"\A", r"\Z"]
QUANTIFIERS = ["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "{,2}"]
NOT_HELD = [r"(?<=a)", r"(?<!b)", r"\p{L}", r"(a)\1", "(?>a)", "a*+", "(?m)^", "a{900}", r"\q"]


def random_pattern(rng: random.Random, depth: int = 0, anchors: float = 0.1) -> str:
    """An expression of all constructs, with anchors anywhere."""

    def inner() -> str:
        return random_pattern(rng, depth + 1, anchors)

    def atom() -> str:
        return rng.choice([rng.choice("abcxk"), rng.choice("abcxk"), rng.choice(SETS), rng.choice(ESCAPES), "."])

    def element() -> str:
        draw = rng.random()
        if draw < anchors:
            return rng.choice(ANCHORS)
        if depth < 3 and draw < anchors + 0.25:
            looks = [f"(?={inner()})", f"(?!{inner()})"] if rng.random() < 0.3 else []
            kind = rng.choice(["({})", "(?:{})", f"(?P<n{rng.randrange(10**9)}>{{}})", f"(?<m{rng.randrange(10**9)}>{{}})"])
            quantifier = rng.choice(QUANTIFIERS) + rng.choice(["", "?"]) if rng.random() < 0.4 else ""
            return rng.choice(looks) if looks else kind.format(inner()) + quantifier
        return atom() + (rng.choice(QUANTIFIERS) + rng.choice(["", "", "?"]) if rng.random() < 0.35 else "")

    def sequence() -> str:
        return "".join(element() for _ in range(rng.randint(depth > 0, 4 - depth)))

    pattern = "|".join(sequence() for _ in range(rng.choice([1, 1, 1, 2, 3])))
    if depth:
        return pattern
    if rng.random() < 0.4:
        pattern = rng.choice([f"^{pattern}$", f"^({pattern})$", f"^(?:{pattern})", f"{pattern}$", f"^{pattern}"])
    if rng.random() < 0.1:
        pattern = rng.choice(["(?i)", "(?s)", "(?i:{})", "(?x)", "(?a)"]).replace("{}", "a") + pattern
    if rng.random() < 0.05:
        pattern += rng.choice(NOT_HELD)
    return pattern


def random_texts(rng: random.Random, pattern: str, number: int) -> Iterator[str]:
    """Short texts, made of the pattern's own letters as well."""
    own = [c for c in pattern if c in LETTERS] or ["a"]
    yield ""
    for _ in range(number - 1):
        letters = rng.choice([own, LETTERS, own + list(LETTERS), LETTERS + DISPUTED])
        yield "".join(rng.choices(letters, k=rng.choice([1, 1, 2, 2, 3, 4, 6])))


class Comparison:
    """Counts of pairs that agree, `wrong` ones, and patterns that are refused with their reasons."""

    def __init__(self) -> None:
        vocabulary = xgrammar.TokenizerInfo([*(bytes([i]) for i in range(256)), b""], stop_token_ids=[256])
        self._compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
        self.num_pairs = self.num_taken = self.num_patterns = 0
        self.refused: Counter[str] = Counter()
        self.wrong: list[tuple[str, str, bool, bool]] = []

    def pattern(self, rng: random.Random, pattern: str, in_json: bool, num_texts: int) -> None:
        search: Callable[..., Any] = re.search if in_json else re.fullmatch
        python = re.sub(r"\(\?<(?=[a-z])", "(?P<", pattern)
        self.num_patterns += 1
        try:
            takes = self._taker(pattern, in_json)
        except ValueError as error:
            self.refused[re.sub(r"\d+|'.*'", "N", str(error))[:90]] += 1
            if str(error) != "no text fits it":
                return
            takes = lambda text: False  # noqa: E731
        flags = (re.ASCII,) if "(?a)" in pattern else (re.UNICODE, re.ASCII)
        for text in random_texts(rng, pattern, num_texts):
            wanted = [bool(search(python, text, flag)) for flag in flags]
            got = takes(text)
            self.num_pairs += 1
            self.num_taken += got
            disputed = bool(set(text) & set(DISPUTED)) or (text == "" and r"\B" in pattern)
            if (got and not all(wanted)) or (not got and all(wanted) and not disputed):
                self.wrong.append((pattern, text, in_json, got))

    def _taker(self, pattern: str, in_json: bool) -> Callable[[str], bool]:
        text = rewrite(pattern, Budget(), in_json=in_json)
        if in_json:
            grammar = xgrammar.Grammar.from_json_schema(json.dumps({"type": "string", "pattern": f"^{text}$"}))
        else:
            grammar = xgrammar.Grammar.from_regex(text)
        matcher = xgrammar.GrammarMatcher(self._compiler.compile_grammar(grammar))

        def takes(candidate: str) -> bool:
            matcher.reset()
            return bool(matcher.accept_string(f'"{candidate}"' if in_json else candidate) and matcher.is_completed())

        return takes


def compare(num_pairs: int, seed: int) -> Comparison:
    rng, comparison = random.Random(seed), Comparison()
    while comparison.num_pairs < num_pairs:
        pattern = random_pattern(rng, anchors=rng.choice([0, 0.1, 0.3]))
        try:
            re.compile(re.sub(r"\(\?<(?=[a-z])", "(?P<", pattern))
        except re.error:
            if not any(part in pattern for part in NOT_HELD):
                continue  # the generator's own nonsense
        comparison.pattern(rng, pattern, rng.random() < 0.6, 16)
    return comparison


def main(num_pairs: int) -> None:
    done = compare(num_pairs, seed=num_pairs)
    num_refused = sum(done.refused.values())
    print(f"{done.num_pairs} pairs, {done.num_taken} taken, of {done.num_patterns} patterns; {len(done.wrong)} wrong")
    print(f"{num_refused} patterns refused ({num_refused / done.num_patterns:.1%}):")
    for reason, number in done.refused.most_common():
        print(f"  {number:6} {reason}")
    for case in done.wrong[:20]:
        print("wrong:", case)


if __name__ == "__main__":
    main(int(sys.argv[1]))
