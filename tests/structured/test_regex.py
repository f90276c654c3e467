"""Expressions mean for xgrammar what they mean for Python, within a text of its own and within a JSON string."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest
import xgrammar

from tests.structured.random_patterns import compare
from vlserve.structured.regex import Budget, rewrite, rewrite_all

ASCII = [chr(code) for code in range(1, 127)]


@pytest.fixture(scope="module")
def compiler() -> xgrammar.GrammarCompiler:
    vocabulary = xgrammar.TokenizerInfo([*(bytes([i]) for i in range(256)), b""], stop_token_ids=[256])
    return xgrammar.GrammarCompiler(vocabulary, max_threads=1)


def fits(compiler: xgrammar.GrammarCompiler, pattern: str, texts: list[str], in_json: bool = False) -> list[str]:
    """Those of `texts` that the rewritten pattern takes."""
    text = rewrite(pattern, Budget(), in_json=in_json)
    if in_json:
        schema: dict[str, Any] = {"type": "string", "pattern": f"^{text}$"}
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    else:
        matcher = xgrammar.GrammarMatcher(compiler.compile_regex(text))
    taken = []
    for candidate in texts:
        matcher.reset()
        if matcher.accept_string(f'"{candidate}"' if in_json else candidate) and matcher.is_completed():
            taken.append(candidate)
    return taken


@pytest.mark.parametrize("form", ("{}", "[{}]", "[^{}]", "[A{}]", "[{}a]", "[{}-~]", "{}cd", "{}{{2}}"))
def test_every_ascii_character_means_itself(compiler: xgrammar.GrammarCompiler, form: str) -> None:
    for character in ASCII:
        pattern = form.format("\\" + character if not character.isalnum() else character)
        texts = [*ASCII, character + "cd", character * 2]
        want = [t for t in texts if re.fullmatch(pattern, t, re.ASCII)]
        assert fits(compiler, pattern, texts) == want, pattern
        harmless = [t for t in texts if min(t) >= " " and not set(t) & {'"', "\\"}]
        if character in harmless:
            assert fits(compiler, pattern, harmless, in_json=True) == [t for t in harmless if re.search(pattern, t, re.ASCII)]


PATTERNS = [
    r"a|b*",
    r"(ab)+|c?",
    r"(?:a|b){2,3}",
    r"[^ab]c?",
    r"a{0}",
    r"a{2,}",
    r"a{,2}",
    r"^ab?$",
    r"(|a)b",
    r"a*?b+?",
    r"(?P<x>a)c",
    r"\d\D",
    r"\w\W",
    r".",
    r"a.b",
    r"^a|b$",
    r"(a|^b)c",
    r"[a-c]{3}",
    r"[\]\-^_]+",
    r"é+",
    r"[é-ü]a",
    r"[^é]",
    r"\u00e9",
    r"😀",
    r"[😀-😎]{2}",
    r"\.",
    r"\/",
    r"((a|b)c){2}",
    r"x{0,3}y",
    r"[^\x01ab]",
    r"[\x01\x02a-c]",
    r"[\x01-\]\^-é]",
    r"[\x01\^]",
    r"^(a|b)$",
    r"^((a|^b)|c$)",
    r"a^b|^$",
    r"(?=.b)a?b|(?!a).",
    r"^(?!.*bb)[ab]+$",
    r"(?:(?!bc).)*",
    r"\ba|b\B",
    r"(?i)A[^B]c?",
    r"(?i:a)B",
    r"(?s)a.b",
    r"(b|(?=a))a",
    r"(a*)^b?",
    r"(?!(?!a)b)[abc]+",
    r"\Aa\Z",
    r"(x{2,}y?)?",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_expressions_mean_what_python_says(compiler: xgrammar.GrammarCompiler, pattern: str) -> None:
    rng = random.Random(pattern)
    texts = ["".join(letters) for n in range(4) for letters in itertools.product("abc", repeat=n)]
    letters = "abcxyAB -^]_./1\n→😀😎" + ("éü" if "é" in pattern else "")
    texts += ["".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(300)]
    assert fits(compiler, pattern, texts) == [t for t in texts if re.fullmatch(pattern, t, re.ASCII)]
    texts = [text for text in texts if "\n" not in text]
    assert fits(compiler, pattern, texts, in_json=True) == [t for t in texts if re.search(pattern, t, re.ASCII)]


def test_what_readers_disagree_on_is_left_out(compiler: xgrammar.GrammarCompiler) -> None:
    """JavaScript, Rust and Python with or without Unicode: \\W, \\S, \\D and a dot let through what is none for all."""
    disputed = ["é", "\u00a0", "\u0663", "\u2028", "ſ"]
    for pattern, want in ((r"\w|\s|\d", []), (r"\W", ["\u00a0", "\u2028"]), (r"\S", ["é", "\u0663", "ſ"]), (".", None)):
        got = fits(compiler, f"^({pattern})$", disputed, in_json=True)
        assert got == ([t for t in disputed if t != "\u2028"] if want is None else want), pattern
    assert fits(compiler, r"\D", disputed) == ["é", "\u00a0", "\u2028", "ſ"]
    assert fits(compiler, "^(?!\\W)...?$", ["éa ", "ab "], in_json=True) == ["ab "]
    assert fits(compiler, "(?i)^[^s]$", ["ſ", "s", "S", "t"], in_json=True) == ["t"]


def test_random_expressions_are_neither_taken_nor_refused_wrongly() -> None:
    done = compare(3000, seed=16)
    assert not done.wrong and done.num_taken > 500
    assert sum(done.refused.values()) - done.refused["no text fits it"] < 0.15 * done.num_patterns, done.refused


def test_several_expressions_and_a_length_hold_at_once(compiler: xgrammar.GrammarCompiler) -> None:
    texts = ["".join(letters) for n in range(6) for letters in itertools.product("ab.", repeat=n)]
    for patterns, least, most in ((["^a", "b$"], 0, None), ([r"^[ab.]+$", r"\.", "^(?!b)"], 3, 4), (["a"], 2, 3), ([""], 2, 4)):
        text = rewrite_all(patterns, Budget(), least=least, most=most)
        matcher = xgrammar.GrammarMatcher(compiler.compile_regex(text))
        for candidate in texts:
            matcher.reset()
            wanted = least <= len(candidate) <= (most or 9) and all(re.search(p, candidate) for p in patterns)
            assert (matcher.accept_string(candidate) and matcher.is_completed()) == wanted, (patterns, candidate)
    assert rewrite_all(["^[a-c]{2}$", "^..$"], Budget(), least=1) == rewrite("^[a-c]{2}$", Budget(), in_json=True)
    with pytest.raises(ValueError, match="no text fits"):
        rewrite_all(["^a", "^b"], Budget())


@pytest.mark.parametrize("pattern", (".", ".*", "[^a]{1,3}", r"\S+", r"[\s\S]", "é|.", "[!-~]", r"\W"))
def test_nothing_breaks_out_of_a_json_string(compiler: xgrammar.GrammarCompiler, pattern: str) -> None:
    assert fits(compiler, pattern, ['"', "\\", "\n", "\t", "\x01", 'a"b', "a\\"], in_json=True) == []


@pytest.mark.parametrize(
    "pattern,reason",
    [
        ("(?=a)b", "no text fits"),
        ("(?<!a)b", "lookbehind is not supported; say in the expression itself"),
        (r"(a)\1", "backreferences are not supported; write the texts out"),
        ("(?>a)", "atomic groups are not supported; use|unknown extension"),
        ("a*+b", "possessive repeats are not supported; use|multiple repeat"),
        ("((?=a)|b)*", "in a repeat needs a character beside it"),
        ("((?=a)b){99}", "may repeat up to 16 times"),
        ("(?m)^a", r"the flag \(\?m\) is not supported; write"),
        ("(?i)é", "for ASCII letters only; write both cases"),
        (r"\p{L}", "bad escape .*; write the characters as a class"),
        ("(a", "missing"),
        ("*a", "nothing to repeat"),
        ("a{70000}", "repeats 70000 times"),
        ("(a{500}){500}", "states"),
        ("(" * 4000, "nested|missing"),
        # what would take minutes, or hours
        ("((a{0,100}){0,100}){0,100}b(?=c)c", "too large an automaton"),
        ("^(?=.*a.{8}b$)[ab]*$", "too large an automaton"),
        ("[" * 4000, "unterminated|nested"),
    ],
)
def test_the_rest_is_refused_with_a_reason(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rewrite(pattern, Budget())


def test_expressions_of_one_request_share_the_work() -> None:
    budget = Budget()
    for n in range(3):
        with pytest.raises(ValueError, match="too large an automaton"):
            rewrite(f"^(?=.*a.{{8}}b$)[ab{n}]*$", budget)
    with pytest.raises(ValueError, match="too large an automaton"):
        rewrite("^(?=.*a)[ab]*$", budget)
    rewrite("^(?=.*a)[ab]*$", Budget())


def test_in_json_quotes_and_long_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="quote"):
        rewrite('^"a"$', Budget(), in_json=True)
    with pytest.raises(ValueError, match="repeats 500 times; 128"):
        rewrite("^a{500}$", Budget(), in_json=True)


def test_what_is_equal_is_counted_once() -> None:
    budget = Budget()
    for _ in range(20):
        rewrite("a{100}", budget)
    with pytest.raises(ValueError, match="fewer different ones"):
        for n in range(20):
            rewrite(f"a{{{100 + n}}}", budget)
