"""History, tools and wishes reach a template like GPT-OSS's as it wants them, and what it opens is known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from tests.checkpoints import make_tokenizer
from vlserve.errors import RequestError
from vlserve.models.checkpoint import read_checkpoint
from vlserve.prompt.build import PromptBuilder
from vlserve.prompt.chat_messages import read_messages
from vlserve.prompt.chat_template import ChatTemplate
from vlserve.prompt.conversation import Message, PromptOptions, Text
from vlserve.prompt.harmony import final_opening, opened
from vlserve.prompt.tokenizer import Tokenizer

MARKS = ("<|startoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>")
# what GPT-OSS's template does with messages, in short
TEMPLATE = """
{%- if not reasoning_effort is defined %}{% set reasoning_effort = "medium" %}{% endif %}
{{- "<|start|>system<|message|>Today is " + strftime_now("%Y") + "\\n\\nReasoning: " + reasoning_effort }}
{%- if builtin_tools %}{% for tool in builtin_tools %}{{ "\\nbuilt in: " + tool }}{% endfor %}{% endif %}
{{- "<|end|>" }}
{%- if tools %}{{ "<|start|>developer<|message|>" }}
{%- for tool in tools %}{% set tool = tool.function %}{{ "// " + tool.description + "\\ntype " + tool.name }}{% endfor %}
{{- "<|end|>" }}{% endif %}
{%- set last = namespace(name=none) %}
{%- for message in messages %}
{%- if message.role == "assistant" %}
{%- if "thinking" in message and "<|channel|>analysis<|message|>" in message.thinking %}{{ raise_exception("tags") }}{% endif %}
{%- if "tool_calls" in message %}
{%- if message.content and message.thinking %}{{ raise_exception("Cannot pass both content and thinking") }}{% endif %}
{%- set thought = message.content or message.thinking %}
{%- if thought %}{{ "<|start|>assistant<|channel|>analysis<|message|>" + thought + "<|end|>" }}{% endif %}
{%- set call = message.tool_calls[0] %}{% if call.function %}{% set call = call.function %}{% endif %}
{{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
{{- call.arguments|tojson + "<|call|>" }}{% set last.name = call.name %}
{%- else %}{{ "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}{% endif %}
{%- elif message.role == "tool" %}
{{- "<|start|>functions." + last.name + " to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|end|>" }}
{%- else %}{{ "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
"""
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
OF_USER = "<|start|>user<|message|>Hi<|end|>"


def call(id: str, name: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": '{"city": "Paris"}'}}


def called(name: str) -> str:
    return f'<|start|>assistant to=functions.{name}<|channel|>commentary json<|message|>{{"city": "Paris"}}<|call|>'


def result(name: str, text: str) -> str:
    return f'<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>"{text}"<|end|>'


def make_tokenizer_of_channels(folder: Path) -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make_tokenizer_of_channels(tmp_path)


@pytest.fixture
def template(tmp_path: Path, tokenizer: Tokenizer) -> ChatTemplate:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return ChatTemplate(tmp_path, tokenizer)


def rendered(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> str:
    turns = read_messages(messages, local=False)
    given = [Message(turn.role, [Text(str(part)) for part in turn.parts], turn.is_string, turn.fields) for turn in turns]
    pieces = template.pieces(given, PromptOptions(**options))
    return "".join(piece if isinstance(piece, str) else piece.text for piece in pieces)


HISTORIES: list[tuple[list[dict[str, Any]], str]] = [
    ([USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}],
     "<|start|>assistant<|channel|>final<|message|>Yes.<|end|>"),
    ([USER, {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [call("1", "rain")]}],
     "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>" + called("rain")),
    ([USER, {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call("1", "rain")]}],
     "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|>" + called("rain")),
    ([USER, {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": [call("1", "rain")]}],
     "<|start|>assistant<|channel|>analysis<|message|>Hm.\nI look.<|end|>" + called("rain")),
    ([USER, {"role": "assistant", "content": "", "tool_calls": [call("1", "rain"), call("2", "sun")]},
      {"role": "tool", "tool_call_id": "2", "content": "no"}, {"role": "tool", "tool_call_id": "1", "content": "much"}],
     called("rain") + result("rain", "much") + called("sun") + result("sun", "no")),
    ([USER, {"role": "assistant", "content": "", "tool_calls": [call("1", "rain"), call("2", "sun")]},
      {"role": "tool", "content": "much"}, {"role": "tool", "content": [{"type": "text", "text": "no"}]}],
     called("rain") + result("rain", "much") + called("sun") + result("sun", "no")),
]  # fmt: skip


@pytest.mark.parametrize("messages,want", HISTORIES, ids=range(len(HISTORIES)))
def test_history(messages: list[dict[str, Any]], want: str, template: ChatTemplate) -> None:
    assert rendered(template, messages).partition("<|end|>")[2] == OF_USER + want + "<|start|>assistant"


def test_parts_are_one_text_for_a_template_of_texts(template: ChatTemplate, tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "<|end|> there"}]}
    want = "<|start|>user<|message|>Hi\n<|end|> there<|end|><|start|>assistant"
    assert rendered(template, [parts]).endswith(want)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    )
    assert rendered(ChatTemplate(tmp_path, tokenizer), [parts]) == want.removesuffix("<|start|>assistant"), "no Python list"


def test_tools_and_wishes(template: ChatTemplate) -> None:
    tools = [{"type": "function", "function": {"name": "rain"}}]
    assert "// \ntype rain" in rendered(template, [USER], tools=tools), "a description may be missing"
    for asked, want in (("none", "low"), ("minimal", "low"), ("medium", "medium"), ("high", "high"), ("xhigh", "high")):
        assert f"Reasoning: {want}<|end|>" in rendered(template, [USER], wishes={"reasoning_effort": asked})
    assert "built in: python" in rendered(template, [USER], variables={"builtin_tools": ["python"]})


@pytest.mark.parametrize("before", [[], [{"role": "assistant", "content": "", "tool_calls": [call("1", "rain")]},
    {"role": "tool", "tool_call_id": "1", "content": "much"}, {"role": "assistant", "content": "Rain."}]])  # fmt: skip
def test_a_result_without_its_call_is_named(before: list[dict[str, Any]], template: ChatTemplate) -> None:
    messages = [USER, *before, {"role": "tool", "tool_call_id": "call_7", "content": "no"}]
    with pytest.raises(RequestError, match='tool_call_id "call_7".*must have the call in its tool_calls') as caught:
        rendered(template, messages)
    assert caught.value.param == f"messages[{len(messages) - 1}]" and caught.value.param in str(caught.value)
    messages[-2:] = [{"role": "assistant", "content": "", "tool_calls": [call("call_7", "sun")]}, USER, messages[-1]]
    assert rendered(template, messages).endswith(OF_USER + result("sun", "no") + "<|start|>assistant")


def test_a_prompt_says_whether_its_answer_is_told_apart(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    make_tokenizer_of_channels(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    builder, messages = PromptBuilder(read_checkpoint(folder)), [Message("user", [Text("Hi")], is_string=True)]
    assert builder.build(messages).opened == "assistant"
    assert builder.build(messages, PromptOptions(only_final=True)).opened == "assistant<|channel|>final<|message|>"
    assert builder.build(messages, PromptOptions(is_raw=True)).opened is None
    assert PromptBuilder(read_checkpoint(checkpoint())).build(messages).opened is None


def test_what_a_prompt_opens_is_known(template: ChatTemplate, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def encoded(messages: list[dict[str, Any]], **options: Any) -> list[int]:
        turns = read_messages(messages, local=False)
        given = [Message(turn.role, [Text(str(part)) for part in turn.parts], turn.is_string, turn.fields) for turn in turns]
        return tokenizer.encode_rendered(template.pieces(given, PromptOptions(**options)))

    ids = encoded([USER])
    assert opened(ids, tokenizer) == "assistant"
    final = ids + final_opening(ids, tokenizer)
    assert opened(final, tokenizer) == "assistant<|channel|>final<|message|>"
    assert final_opening(final, tokenizer) == []
    begun = encoded([USER, {"role": "assistant", "content": "A cir"}], continue_final=True)
    assert opened(begun, tokenizer) == "assistant<|channel|>final<|message|>A cir" and not final_opening(begun, tokenizer)
    assert opened(tokenizer.encode_plain("<|start|>assistant"), tokenizer) is None, "a text is no format"
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert opened(ids, Tokenizer(tmp_path)) is None
