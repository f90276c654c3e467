"""Reasoning, content and function calls come out of a text the same, however it is cut into pieces."""

from __future__ import annotations

import random

import pytest

from vlserve.pipeline.outputs import Piece
from vlserve.server.output_parser import ReplyParser

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris}", "days": [1, {"a": "\\"}"}]}}\n</tool_call>'
OTHER_ORDER = '<tool_call>{"arguments": {"b": 1}, "name": "second"}</tool_call>'
WEATHER = ("call", "weather", '{"city": "Paris}", "days": [1, {"a": "\\"}"}]}')
# text, calls looked for, prompt ended in <think>, what comes out
CASES: list[tuple[str, bool, bool, list[tuple[str, ...]]]] = [
    ("A circle.", True, False, [("content", "A circle.")]),
    ("", True, False, []),
    ("<think>\nhm\n</think>\n\nA star.", False, False, [("reasoning", "hm"), ("content", "A star.")]),
    ("hm</think>Yes\n", False, True, [("reasoning", "hm"), ("content", "Yes\n")]),
    ("\n<thin", False, False, [("content", "\n<thin")]),
    ("never ends", False, True, [("reasoning", "never ends")]),
    ("a <think> b", False, False, [("content", "a <think> b")]),
    (CALL, True, False, [WEATHER]),
    (CALL, False, False, [("content", CALL)]),
    (f"Let me see.\n{CALL}\n{OTHER_ORDER}", True, False, [("content", "Let me see."), WEATHER, ("call", "second", '{"b": 1}')]),
    (f"<think>x</think>{CALL}", True, False, [("reasoning", "x"), WEATHER]),
    ("<tool_call>not json</tool_call>!", True, False, [("content", "<tool_call>not json</tool_call>!")]),
    ('<tool_call>{"name": "f"', True, False, [("call", "f", "")]),
    ('<tool_call>{"name": "f', True, False, [("content", '{"name": "f')]),
    ('<tool_call>{"name": "f", "arguments": {"a', True, False, [("call", "f", '{"a')]),
    ('<tool_call>{"name": "f"}</tool_call>', True, False, [("call", "f", "{}")]),
    ("<tool_call>[1]</tool_call>", True, False, [("content", "<tool_call>[1]</tool_call>")]),
    ("1 < 2 <tool", True, False, [("content", "1 < 2 <tool")]),
    ("line\n\n<tool_call", True, False, [("content", "line\n\n<tool_call")]),
]


def merged(pieces: list[Piece]) -> list[tuple[str, ...]]:
    out: list[list[str]] = []
    last: tuple[str, int] | None = None
    for piece in pieces:
        if piece.kind == "call" and piece.name is not None:
            out.append(["call", piece.name, piece.text])
        elif last == (piece.kind, piece.call):
            out[-1][-1] += piece.text
        else:
            assert piece.kind != "call", "a call begins with its name"
            out.append([piece.kind, piece.text])
        last = (piece.kind, piece.call)
    return [tuple(entry) for entry in out]


@pytest.mark.parametrize("text,calls,thinking,want", CASES, ids=range(len(CASES)))
def test_any_cutting_gives_the_same(text: str, calls: bool, thinking: bool, want: list[tuple[str, ...]]) -> None:
    rng = random.Random(text)
    for size in (1, 2, 3, len(text) or 1, *(rng.randint(1, 9) for _ in range(10))):
        parser = ReplyParser(calls=calls, thinking=thinking)
        pieces = [piece for i in range(0, len(text), size) for piece in parser.add(text[i : i + size])]
        assert merged(pieces + parser.finish()) == want, f"in pieces of {size}"


def test_arguments_come_while_they_are_written() -> None:
    parser = ReplyParser(calls=True)
    early = [piece for character in CALL[:60] for piece in parser.add(character)]
    assert early[0].name == "weather" and merged(early)[0][2] == '{"city": "Paris}",'[: len(merged(early)[0][2])]
    assert len(merged(early)[0][2]) > 5, "nothing is held back until the end"


CALLS = f"{CALL}\n{CALL}"


def test_a_call_that_was_cut_leaves_no_markup() -> None:
    """Wherever the answer ends: no text, a call as soon as its name is known, with the arguments so far."""
    arguments = WEATHER[2]
    for end in range(len(CALLS) + 1):
        for size in (1, 7, 200):
            parser = ReplyParser(calls=True, only_calls=True)
            pieces = [piece for i in range(0, end, size) for piece in parser.add(CALLS[i : min(end, i + size)])]
            got = merged(pieces + parser.finish(cut=end < len(CALLS)))
            assert all(kind == "call" and name == "weather" for kind, name, *_ in got), CALLS[:end]
            assert all(arguments.startswith(text) for _, _, text in got)
            num_named = sum(CALLS.startswith(CALLS[: i + 1]) and CALLS[: i + 1].endswith('"weather"') for i in range(end))
            assert len(got) == num_named, CALLS[:end]


@pytest.mark.parametrize(
    "text,want",
    [
        ("Well <tool_c", [("content", "Well ")]),
        ("1 <", [("content", "1 <")]),
        ("<thi", []),
        ("<think>hm</thin", [("reasoning", "hm")]),
        ('Well\n<tool_call>\n{"na', [("content", "Well")]),
    ],
)
def test_half_a_tag_of_an_answer_that_was_cut_is_no_text(text: str, want: list[tuple[str, ...]]) -> None:
    parser = ReplyParser(calls=True)
    assert merged(parser.add(text) + parser.finish(cut=True)) == want
