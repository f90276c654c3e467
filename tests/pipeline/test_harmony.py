"""Harmony's channels come out of an answer the same, however it is cut into pieces, and none of the format is left."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.server.test_output_parser import merged
from vlserve.pipeline.harmony import HarmonyParser
from vlserve.server.output_parser import ReplyParser

THOUGHT = "<|channel|>analysis<|message|>Hm, {}.<|end|>"
ANSWER = "<|channel|>final<|message|>A circle.\n"
CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
OF_THE_ROLE = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
WEATHER = ("call", "weather", '{"city": "Paris"}')
# text, calls looked for, what comes out
CASES: list[tuple[str, bool, list[tuple[str, ...]]]] = [
    (ANSWER + "<|return|>", False, [("content", "A circle.\n")]),
    (f"{THOUGHT}<|start|>assistant{ANSWER}<|return|>", False, [("reasoning", "Hm, {}."), ("content", "A circle.\n")]),
    (f"{THOUGHT}<|start|>assistant{ANSWER}", True, [("reasoning", "Hm, {}."), ("content", "A circle.\n")]),
    (f"{THOUGHT}<|start|>assistant{CALL}", True, [("reasoning", "Hm, {}."), WEATHER]),
    (f"{THOUGHT}<|start|>assistant{CALL}".removesuffix("<|call|>"), True, [("reasoning", "Hm, {}."), WEATHER]),
    (OF_THE_ROLE, True, [WEATHER]),
    (f"{CALL}<|start|>assistant{OF_THE_ROLE}", True, [WEATHER, WEATHER]),
    (CALL, False, [("content", '{"city": "Paris"}')]),
    ("<|channel|>commentary to=get_time<|message|><|call|>", True, [("call", "get_time", "{}")]),
    (CALL[:-12], True, [("call", "weather", '{"city": "Par')]),  # cut off
    ("<|channel|>commentary to=functions.wea", True, []),
    ("<|channel|>ana", False, []),
    ("", True, []),
    (f"{THOUGHT}<|start|>assistant", True, [("reasoning", "Hm, {}.")]),
    (f"<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant{CALL}", True, [("content", "Let me see."), WEATHER]),
    (f"{THOUGHT}{THOUGHT}<|start|>assistant{ANSWER}", False, [("reasoning", "Hm, {}.\nHm, {}."), ("content", "A circle.\n")]),
    (f"{THOUGHT[:-7]}<|start|>assistant{ANSWER}", False, [("reasoning", "Hm, {}."), ("content", "A circle.\n")]),  # ends left out
    (f"{THOUGHT[:-7]}{ANSWER}", False, [("reasoning", "Hm, {}."), ("content", "A circle.\n")]),
    ("A circle.", True, [("content", "A circle.")]),  # no header at all
    ("assistant", True, [("content", "assistant")]),
    ("<|channel|>analysis to=python code<|message|>print(1)<|call|>", True, [("reasoning", "print(1)")]),
    ("<|channel|>final<|message|>1 < 2 and <|x|> <|", False, [("content", "1 < 2 and <|x|> <|")]),
    ("<|channel|>final Hello world", True, [("content", "Hello world")]),  # without <|message|>
    ("<|channel|>final Hello world<|end|><|start|>assistant" + ANSWER, True, [("content", "Hello world\nA circle.\n")]),
    (f"<|channel|>analysis Hm.<|return|><|start|>assistant{ANSWER}", True, [("reasoning", "Hm."), ("content", "A circle.\n")]),
    ("<|channel|>commentary to=functions.weather <|constrain|>json", True, []),
    (' to=functions.weather<|channel|>commentary json {"city": 1}', True, [("content", '{"city": 1}')]),
    ("<|channel|>final A <|constrain|> B", True, [("content", "A   B")]),
    (f"{THOUGHT}assistants help", True, [("reasoning", "Hm, {}."), ("content", "assistants help")]),
    (f"{THOUGHT}toolbox", True, [("reasoning", "Hm, {}."), ("content", "toolbox")]),
    (f"{THOUGHT}\nassistant foo", True, [("reasoning", "Hm, {}."), ("content", " foo")]),
    (f"{THOUGHT}\nassistant", True, [("reasoning", "Hm, {}.")]),
    (f"{THOUGHT}\nassistant{ANSWER}", True, [("reasoning", "Hm, {}."), ("content", "A circle.\n")]),
    ("s help", True, [("content", "s help")]),  # behind the prompt's "assistant"
    ("user guide", True, [("content", "user guide")]),
    ("<|channel|>commentary to=functions.<|message|>A circle.", True, [("content", "A circle.")]),
    ("<|channel|>commentary to=assistant<|message|>A circle.", True, [("content", "A circle.")]),
    ("<|channel|>commentary to=functions<|message|>A circle.", True, [("content", "A circle.")]),
    ("<|channel|>commentary to=functions.user<|message|>{}", True, [("call", "user", "{}")]),
    ('<|channel|>final<|message|><tool_call>{"name": 1}', True, [("content", '<tool_call>{"name": 1}')]),
]


def parsed(text: str, size: int, opened: str = "assistant", **options: Any) -> list[tuple[str, ...]]:
    parser = HarmonyParser(opened, **options)
    pieces = [piece for i in range(0, len(text), size) for piece in parser.add(text[i : i + size])]
    return merged(pieces + parser.finish())


@pytest.mark.parametrize("text,calls,want", CASES, ids=range(len(CASES)))
def test_any_cutting_gives_the_same(text: str, calls: bool, want: list[tuple[str, ...]]) -> None:
    rng = random.Random(text)
    for size in (1, 2, 3, len(text) or 1, *(rng.randint(1, 9) for _ in range(10))):
        assert parsed(text, size, calls=calls) == want, f"in pieces of {size}"


def test_a_header_that_was_cut_is_no_content() -> None:
    for text in ("<|channel|>final Hello", "<|channel|>ana", " to=functions.wea", f"{THOUGHT}<|start|>assis", f"{THOUGHT}\nuser"):
        parser = HarmonyParser("assistant", calls=True)
        assert all(piece.kind == "reasoning" for piece in parser.add(text) + parser.finish(cut=True)), text
    parser = HarmonyParser("assistant", calls=True)
    assert merged(parser.add("use") + parser.finish(cut=True)) == [("content", "use")], "the prompt has the role"


def test_reasoning_beside_content_stands_in_tags() -> None:
    text = f"{THOUGHT}<|start|>assistant{ANSWER}"
    for size in (1, 7, 100):
        assert parsed(text, size, calls=False, reasoning=False) == [("content", "<think>Hm, {}.</think>A circle.\n")]


def test_an_answer_goes_on_where_the_prompt_ends() -> None:
    begun = "assistant<|channel|>final<|message|>A cir"
    assert parsed("cle.<|return|>", 3, begun, calls=False) == [("content", "cle.")]
    assert parsed("ore.<|end|>" + ANSWER, 3, "assistant<|channel|>analysis<|message|>m", calls=False)[0] == ("reasoning", "ore.")
    assert parsed(f"<|start|>assistant{ANSWER}", 3, "user<|message|>Hello<|end|>", calls=False) == [("content", "A circle.\n")]


def test_what_a_grammar_holds_the_final_channel_to_is_read_as_hermes_calls() -> None:
    inner = ReplyParser(calls=True, reasoning=False, only_calls=True)
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert parsed(text, 5, "assistant<|channel|>final<|message|>", calls=True, inner=inner) == [WEATHER]


def test_tokens_of_thoughts_are_counted_as_such() -> None:
    parser = HarmonyParser("assistant", calls=False)
    seen = []
    for token in ("<|channel|>", "analysis", "<|message|>", "Hm", "<|end|>", "<|start|>", "assistant", *ANSWER.partition("A")):
        seen.append(parser.is_reasoning)
        parser.add(token)
    assert seen == [False] * 3 + [True] * 2 + [False] * 5
