"""What clients get of a model that answers in channels: reasoning, content and calls, whole and in chunks, on both routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.test_harmony import ANSWER, CALL, THOUGHT
from tests.prompt.test_harmony import make_tokenizer_of_channels
from vlserve.config import SamplingParams
from vlserve.pipeline.local import LocalPipeline
from vlserve.pipeline.outputs import Delta, Timing, Usage
from vlserve.prompt.build import Prompt
from vlserve.prompt.harmony import final_opening
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.server.chat import ChatAnswer, ChatRequest
from vlserve.server.responses_answer import ResponsesAnswer
from vlserve.server.responses_request import ResponsesRequest

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
MESSAGES = [{"role": "user", "content": "Hi"}]
TIMING = Timing(prepare_s=0, queue_s=0, encode_s=0, ttft_s=0, total_s=0)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer_of_channels(tmp_path)


def prompt_of(tokenizer: Tokenizer, *, final: bool = False) -> Prompt:
    ids = [tokenizer.token_id("<|start|>"), *tokenizer.encode_plain("assistant")]
    return Prompt(ids + (final_opening(ids, tokenizer) if final else []), [])


def deltas(tokenizer: Tokenizer, text: str, reason: str = "stop", *, skips: bool = False) -> list[Delta]:
    """A delta a token; what ended the answer has no text."""
    ids = tokenizer._whole.encode(text, add_special_tokens=False).ids
    detokenizer, usage = (
        tokenizer.detokenizer(skip_special_tokens=skips),
        Usage(prompt_tokens=1, completion_tokens=1, image_tokens=0, cached_tokens=0),
    )
    found = [Delta(text=detokenizer.add(id), token_ids=(id,), usage=usage) for id in ids]
    return [*found, Delta(text=detokenizer.finish(), token_ids=(), usage=usage, finish_reason=reason, timing=TIMING)]  # type: ignore[arg-type]


def chat(
    tokenizer: Tokenizer, text: str, reason: str = "stop", *, final: bool = False, **fields: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message, and the chunks' deltas."""
    answer = ChatAnswer(ChatRequest(messages=MESSAGES, **fields), prompt_of(tokenizer, final=final), tokenizer, "m")
    chunks = [chunk for delta in deltas(tokenizer, text, reason) for chunk in answer.add(0, delta)]
    choice = answer.whole()["choices"][0]
    return choice["message"] | {"finish_reason": choice["finish_reason"]}, [chunk["choices"][0]["delta"] for chunk in chunks]


def test_channels_are_told_apart(tokenizer: Tokenizer) -> None:
    text = f"{THOUGHT}<|start|>assistant{ANSWER}<|return|>"
    message, chunks = chat(tokenizer, text)
    assert (message["reasoning_content"], message["content"]) == ("Hm, {}.", "A circle.\n")
    assert "".join(chunk.get("reasoning_content", "") for chunk in chunks) == "Hm, {}."
    assert "".join(chunk.get("content", "") for chunk in chunks) == "A circle.\n"
    assert chat(tokenizer, text, separate_reasoning=False)[0]["content"] == "<think>Hm, {}.</think>A circle.\n"
    assert chat(tokenizer, text, separate_reasoning=False, skip_special_tokens=False)[0]["content"] == text


def test_calls_come_in_pieces_and_cut(tokenizer: Tokenizer) -> None:
    message, chunks = chat(tokenizer, f"{THOUGHT}<|start|>assistant{CALL}", tools=[TOOL])
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert message["finish_reason"] == "tool_calls" and message["content"] is None
    named = [chunk["tool_calls"][0] for chunk in chunks if "tool_calls" in chunk]
    assert named[0]["function"] == {"name": "weather", "arguments": ""} and len(named) > 3
    cut, _ = chat(tokenizer, CALL.partition("Par")[0], "length", tools=[TOOL])
    assert cut["tool_calls"][0]["function"]["arguments"] == '{"city": "' and cut["finish_reason"] == "length"
    assert chat(tokenizer, "<|channel|>comment", "length", tools=[TOOL])[0]["content"] == ""


def test_parameters_and_prompts_of_each_kind_of_request(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    def sent(**fields: Any) -> tuple[SamplingParams, bool]:
        asked = ChatRequest(messages=MESSAGES, **fields)
        (params,) = asked.for_prompt(asked.params({}), prompt_of(tokenizer), tokenizer)
        return params, asked.prompt_options().only_final

    params, only_final = sent()
    assert not params.skip_special_tokens and params.structured is None and not only_final
    params, only_final = sent(response_format={"type": "json_object"})
    assert not params.skip_special_tokens and params.structured is not None and params.structured.json_object and only_final
    params, only_final = sent(tools=[TOOL], tool_choice="required")
    assert only_final and params.structured is not None and "tool_call" in json.dumps(params.structured.structural_tag)
    strict = TOOL | {"function": TOOL["function"] | {"strict": True}}  # type: ignore[operator]
    params, only_final = sent(tools=[strict])
    assert not only_final and params.structured is None and "strict functions are held to their schemas" in caplog.text


def test_calls_that_must_come(tokenizer: Tokenizer) -> None:
    """A grammar holds the final channel to calls as Hermes models write them."""
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    message, _ = chat(tokenizer, text, final=True, tools=[TOOL], tool_choice="required")
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert chat(tokenizer, '{"a": 1}', final=True)[0]["content"] == '{"a": 1}'


def test_responses(tokenizer: Tokenizer) -> None:
    asked = ResponsesRequest(input="Hi", tools=[{"type": "function", "name": "weather", "parameters": {"type": "object"}}])
    answer = ResponsesAnswer(asked, True, None, SamplingParams(), prompt_of(tokenizer), tokenizer, "m")
    for delta in deltas(tokenizer, f"{THOUGHT}<|start|>assistant{CALL}"):
        for _ in answer.add(0, delta):
            pass
    thought, call = answer.whole()["output"]
    assert thought["content"][0]["text"] == "Hm, {}."
    assert (call["name"], call["arguments"]) == ("weather", '{"city": "Paris"}')


def test_the_library_gives_thoughts_in_tags(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server with separate_reasoning false, so that a pipeline over the network gives the same."""
    text = f"{THOUGHT}<|start|>assistant{ANSWER}"
    pipeline = object.__new__(LocalPipeline)

    async def prepare(turns: Any, options: Any = None) -> Prompt:
        return prompt_of(tokenizer)

    async def answer(prompt: Prompt, sampling: SamplingParams) -> AsyncIterator[Delta]:
        for delta in deltas(tokenizer, text, skips=sampling.skip_special_tokens):
            yield delta

    async def said(**params: Any) -> str:
        return "".join([delta.text async for delta in pipeline.answers([], SamplingParams(**params))])

    monkeypatch.setattr(LocalPipeline, "tokenizer", tokenizer)
    monkeypatch.setattr(pipeline, "prepare", prepare)
    monkeypatch.setattr(pipeline, "answer", answer)
    assert asyncio.run(said()) == "<think>Hm, {}.</think>A circle.\n"
    assert asyncio.run(said(skip_special_tokens=False)) == text
