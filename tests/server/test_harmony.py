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
from vlserve.pipeline.stop_strings import AnswerText
from vlserve.prompt.build import Prompt
from vlserve.prompt.conversation import PromptOptions
from vlserve.prompt.harmony import final_opening, opened
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


def prompt_of(tokenizer: Tokenizer, *, final: bool = False, is_raw: bool = False) -> Prompt:
    ids = [tokenizer.token_id("<|start|>"), *tokenizer.encode_plain("assistant")]
    ids += final_opening(ids, tokenizer) if final else []
    return Prompt(ids, [], opened=None if is_raw else opened(ids, tokenizer))


def deltas(tokenizer: Tokenizer, text: str, prompt: Prompt, reason: str = "stop", **params: Any) -> list[Delta]:
    """A delta a token; what ended the answer has no text."""
    ids = tokenizer._whole.encode(text, add_special_tokens=False).ids
    answer = AnswerText(tokenizer, SamplingParams(**params), prompt.opened)
    usage = Usage(prompt_tokens=1, completion_tokens=1, image_tokens=0, cached_tokens=0)
    found = []
    for id in ids:
        found.append(Delta(text=answer.add(id), token_ids=(id,), usage=usage))
        if answer.stopped:
            break
    rest = "" if answer.stopped else answer.finish()
    return [*found, Delta(text=rest, token_ids=(), usage=usage, finish_reason=reason, timing=TIMING)]  # type: ignore[arg-type]


def chat(
    tokenizer: Tokenizer, text: str, reason: str = "stop", *, final: bool = False, **fields: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message, and the chunks' deltas."""
    asked = ChatRequest(messages=MESSAGES, **fields)
    prompt = prompt_of(tokenizer, final=final, is_raw=asked.prompt_options().is_raw)
    (params,) = asked.for_prompt(asked.params({}), prompt, tokenizer)
    how = {"stop": params.stop, "skip_special_tokens": params.skip_special_tokens}
    answer = ChatAnswer(asked, prompt, tokenizer, "m")
    chunks = [chunk for delta in deltas(tokenizer, text, prompt, reason, **how) for chunk in answer.add(0, delta)]
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


@pytest.mark.parametrize(
    ("stop", "content"),
    [
        ("final", "A circle is "),
        ("circle", "A "),
        *((stop, "A circle is final.") for stop in ("assistant", "analysis", "<", "|", "channel|>final", "<|end|>x", "end|><|s")),
    ],
)
def test_stop_texts_count_only_in_what_a_client_sees(tokenizer: Tokenizer, stop: str, content: str) -> None:
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>A circle is final."
    message, _ = chat(tokenizer, text + "<|return|>", stop=[stop])
    assert (message["reasoning_content"], message["content"]) == ("Hm.", content)
    held = chat(tokenizer, "A circle is final.", final=True, stop=[stop])[0]
    assert held["content"] == content, "in a message that the prompt opened"
    raw = chat(tokenizer, text, stop=[stop], separate_reasoning=False, skip_special_tokens=False)[0]["content"]
    assert raw == text.partition(stop)[0], "what is given as it was written is all seen"


def test_what_is_held_back_for_a_stop_text_ends_at_a_mark(tokenizer: Tokenizer) -> None:
    """Two messages' texts make no stop text together."""
    text = f"<|channel|>analysis<|message|>Hm. sto<|end|><|start|>assistant{ANSWER}"
    message, _ = chat(tokenizer, text.replace("A circle", "p A circle"), stop=["stop"])
    assert (message["reasoning_content"], message["content"]) == ("Hm. sto", "p A circle.\n")


@pytest.mark.parametrize("token", ["<|startoftext|>", "</img>", "<IMG_CONTEXT>"])
def test_special_tokens_that_are_no_marks_are_left_out_as_for_all_models(tokenizer: Tokenizer, token: str) -> None:
    text = f"<|channel|>ana{token}lysis<|message|>H{token}m.<|end|><|start|>assistant<|channel|>final<|message|>A {token}circle."
    message, _ = chat(tokenizer, text)
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "A circle.")
    message, _ = chat(tokenizer, text.replace(f"ana{token}", "ana"), stop=[f"{token}circle"])
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "A "), "a stop text may name it"
    message, _ = chat(tokenizer, text.replace(f"ana{token}", "ana"), skip_special_tokens=False)
    assert (message["reasoning_content"], message["content"]) == (f"H{token}m.", f"A {token}circle.")


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
    assert params.structured is None and not only_final
    params, only_final = sent(response_format={"type": "json_object"})
    assert params.structured is not None and params.structured.json_object and only_final
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
    prompt = prompt_of(tokenizer)
    answer = ResponsesAnswer(asked, True, None, SamplingParams(), prompt, tokenizer, "m")
    for delta in deltas(tokenizer, f"{THOUGHT}<|start|>assistant{CALL}", prompt):
        for _ in answer.add(0, delta):
            pass
    thought, call = answer.whole()["output"]
    assert thought["content"][0]["text"] == "Hm, {}."
    assert (call["name"], call["arguments"]) == ("weather", '{"city": "Paris"}')


def test_the_library_gives_thoughts_in_tags(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server with separate_reasoning false, so that a pipeline over the network gives the same."""
    text = f"{THOUGHT}<|start|>assistant{ANSWER}"
    pipeline = object.__new__(LocalPipeline)

    async def prepare(turns: Any, options: PromptOptions) -> Prompt:
        return prompt_of(tokenizer, is_raw=options.is_raw)

    async def answer(prompt: Prompt, sampling: SamplingParams) -> AsyncIterator[Delta]:
        how = {"stop": sampling.stop, "skip_special_tokens": sampling.skip_special_tokens}
        for delta in deltas(tokenizer, text, prompt, **how):
            yield delta

    async def said(**params: Any) -> str:
        return "".join([delta.text async for delta in pipeline.answers([], SamplingParams(**params))])

    monkeypatch.setattr(LocalPipeline, "tokenizer", tokenizer)
    monkeypatch.setattr(pipeline, "prepare", prepare)
    monkeypatch.setattr(pipeline, "answer", answer)
    assert asyncio.run(said()) == "<think>Hm, {}.</think>A circle.\n"
    assert asyncio.run(said(skip_special_tokens=False)) == text
    assert asyncio.run(said(stop=["circle", "final", "<"])) == "<think>Hm, {}.</think>A "
