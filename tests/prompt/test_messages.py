"""Messages as clients send them back, and what of them reaches the chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage

from tests.prompt.test_build import copy_of
from vlserve.errors import RequestError
from vlserve.models.checkpoint import read_checkpoint
from vlserve.pipeline.remote import _messages
from vlserve.prompt.build import PromptBuilder
from vlserve.prompt.chat_messages import ImagePart, Turn, read_messages
from vlserve.prompt.conversation import Message, PromptOptions, Text

CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "é", "n": 2}'}}
READ = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"at": "é", "n": 2}}}
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def read(**message: Any) -> Turn:
    return read_messages([message], local=False)[0]


NOTES: list[dict[str, Any]] = [
    {"type": "message", "id": "msg_1", "status": "completed"},
    {"annotations": [{"type": "url_citation", "url_citation": {"url": "https://a.example", "title": "a"}}]},
    {"audio": None, "function_call": None, "tool_calls": None, "refusal": None},
    {"parsed": {"count": 3}, "cache_control": {"type": "ephemeral"}},
    {"provider_specific_fields": {"refusal": None}, "thinking_blocks": [{"type": "thinking"}], "images": [], "extra_field": 7},
]


@pytest.mark.parametrize("notes", NOTES, ids=range(len(NOTES)))
@pytest.mark.parametrize("role", ("system", "developer", "user", "assistant", "tool"))
def test_keys_that_cannot_change_the_answer_are_left_out(role: str, notes: dict[str, Any]) -> None:
    assert read(role=role, content="It is", **notes) == read(role=role, content="It is")
    parts = [{"type": "text", "text": "It"}, URL]
    noted = [part | {"cache_control": {"type": "ephemeral"}, "id": "1", "annotations": ["x"]} for part in parts]
    assert read(role=role, content=noted, **notes) == read(role=role, content=parts)


def test_whole_messages_of_the_openai_package_are_sent_back() -> None:
    whole = {
        "role": "assistant",
        "content": '{"count": 3}',
        "refusal": None,
        "reasoning_content": "Three.",
        "reasoning": "Three.",
    }
    plain = read(role="assistant", content='{"count": 3}', reasoning_content="Three.")
    assert read(**ChatCompletionMessage.model_validate(whole).model_dump()) == plain
    assert read(**ParsedChatCompletionMessage[Any].model_validate(whole | {"parsed": {"count": 3}}).model_dump()) == plain
    called = CALL | {"function": {**CALL["function"], "parsed_arguments": {"at": "é", "n": 2}}}  # type: ignore[dict-item]
    message = ParsedChatCompletionMessage[Any].model_validate({"role": "assistant", "tool_calls": [called]})
    for dumped in (message.model_dump(), message.model_dump(exclude_none=True), message.model_dump(mode="json")):
        assert read(**dumped) == Turn(role="assistant", parts=[""], is_string=True, fields={"tool_calls": [READ]})
    streamed = {"index": 0, **CALL, "type": None}
    assert read(role="assistant", tool_calls=[streamed]).fields == {"tool_calls": [READ]}


def test_older_names_of_calls_and_their_results() -> None:
    old = read(role="assistant", content=None, function_call=CALL["function"])
    assert old.fields == {"tool_calls": [{"type": "function", "function": READ["function"]}]}
    result = read(role="function", name="look", content="red")
    assert (result.role, result.parts, result.fields) == ("tool", ["red"], {"name": "look"})


@pytest.mark.parametrize("calls", ({}, {"tool_calls": [CALL]}))
@pytest.mark.parametrize("content", ({}, {"content": None}, {"content": ""}, {"content": []}, {"content": [""]}))
def test_answers_and_results_may_be_empty(calls: dict[str, Any], content: dict[str, Any]) -> None:
    turn = read(role="assistant", **content, **calls)
    assert turn.parts == [""] and turn.is_string and turn.fields == ({"tool_calls": [READ]} if calls else {})
    turn = read(role="tool", tool_call_id="call_1", **content)
    assert turn.parts == [""] and turn.is_string and turn.fields == {"tool_call_id": "call_1"}


def test_kinds_of_text() -> None:
    parts = ["a", {"type": "text", "text": "b"}, {"type": "output_text", "text": "c"}, {"type": "refusal", "refusal": "d"}]
    assert read(role="assistant", content=parts).parts == ["abcd"]
    assert read(role="user", content=[*parts, URL]).parts[:4] == ["a", "b", "c", "d"]
    assert read(role="assistant", content=None, refusal="No.").parts == ["No."], "it was said in the content's place"
    assert read_messages("hi", local=False) == [read(role="user", content="hi")]


ARGUMENTS: list[tuple[Any, Any]] = [
    ('{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}),
    ({"a": 1}, {"a": 1}),
    *((empty, {}) for empty in (None, "", {}, "{}")),
    *((text, text) for text in ('{"a": "cu', "look here", "[1, 2]", "5", '"text"', '{"a": "\\ud83d"}', '{"a":' * 99999)),
]


@pytest.mark.parametrize("given,want", ARGUMENTS, ids=range(len(ARGUMENTS)))
def test_arguments_are_an_object_or_the_text_as_it_is(given: Any, want: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": given}}
    turn = read(role="assistant", tool_calls=[call])
    assert turn.fields["tool_calls"][0]["function"]["arguments"] == want
    sent, _ = _messages([turn])  # by a pipeline that asks a server
    assert read(**sent[0]) == turn


CALLS = {
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}": '{"a": "cu',
    "{{ f.arguments | tojson }}": json.dumps('{"a": "cu'),
    "{% for name, value in f.arguments | items %}{{ name }}={{ value }}{% endfor %}": 'arguments={"a": "cu',
}


def builder(folder: Path, template: str) -> PromptBuilder:
    (folder / "chat_template.jinja").write_text(template)
    return PromptBuilder(read_checkpoint(folder))


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return copy_of(checkpoint("qwen2"), tmp_path)


def test_a_call_that_was_cut_reaches_every_kind_of_template(folder: Path) -> None:
    cut = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": "cu'}}
    turn = read(role="assistant", content=[], tool_calls=[cut])
    messages = [Message("user", [Text("hi")], True), Message("assistant", [Text("")], True, turn.fields)]
    for printed, want in CALLS.items():
        template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set f = c.function %}" + printed + "{% endfor %}"
        made = builder(folder, template + "{{ m.content }}|{% endfor %}")
        assert made.tokenizer.decode(made.build(messages).token_ids) == "hi|" + want + "|"


def test_names_reach_the_template_and_deep_arguments_are_no_fault(folder: Path) -> None:
    made = builder(folder, "{% for m in messages %}{{ m.name or '-' }}: {{ m.content }}{{ m.tool_calls or '' }}\n{% endfor %}")
    turns = read_messages([{"role": "user", "content": "hi", "name": "Ada"}, {"role": "user", "content": "ho"}], local=False)
    messages = [Message(turn.role, [Text(str(part)) for part in turn.parts], True, turn.fields) for turn in turns]
    assert made.tokenizer.decode(made.build(messages).token_ids) == "Ada: hi\n-: ho\n"
    continued = made.build(messages[:1], PromptOptions(continue_final=True))
    assert made.tokenizer.decode(continued.token_ids) == "Ada: hi"
    deep = read(role="assistant", tool_calls=[CALL | {"function": {"name": "f", "arguments": '{"a":' * 900 + "1" + "}" * 900}}])
    with pytest.raises(RequestError, match="cannot take these messages"):
        made.build([Message("assistant", [Text("")], True, deep.fields)])


def test_what_a_template_has_no_variable_for_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    messages = [Message("user", [Text("hi")], True)]
    plain = builder(folder, "{% for m in messages %}{{ m.content }}{% endfor %}")
    want = plain.build(messages).token_ids
    with caplog.at_level(logging.INFO, "vlserve"):
        for _ in range(2):
            for wishes in ({"reasoning_effort": "low", "enable_thinking": True}, {}):
                options = PromptOptions(wishes=wishes, variables={"enable_thinking": False, "other": None})
                assert plain.build(messages, options).token_ids == want
    said = [record.getMessage().split()[0] for record in caplog.records]
    assert sorted(said) == ["enable_thinking", "reasoning_effort"]
    for wrong in ({"enable_thinking": True}, {"thinkng": False}, {"messages": False}, {"raise_exception": 1}):
        with pytest.raises(RequestError, match="no such variable; those that can be set: none"):
            plain.build(messages, PromptOptions(variables=wrong))
    caplog.clear()
    knows = builder(folder, "{{ reasoning_effort }} {{ enable_thinking }}{% for m in messages %} {{ m.content }}{% endfor %}")

    def written(variables: dict[str, Any], wishes: dict[str, Any]) -> str:
        ids = knows.build(messages, PromptOptions(variables=variables, wishes=wishes)).token_ids
        return knows.tokenizer.decode(ids)

    assert written({}, {"reasoning_effort": "none", "enable_thinking": False}) == "none False hi"
    assert written({"enable_thinking": True}, {"reasoning_effort": "none", "enable_thinking": False}) == "none True hi"
    with caplog.at_level(logging.INFO, "vlserve"):
        assert written({}, {"verbosity": "low", "reasoning_effort": "low", "enable_thinking": True}) == "low True hi"
    assert [record.getMessage().split()[0] for record in caplog.records] == ["verbosity"]
    with pytest.raises(RequestError, match="those that can be set: enable_thinking, reasoning_effort"):
        written({"thinking": False}, {})


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"role": "user", "content": None}, "messages[0].content", "an empty text"),
    ({"role": "user", "content": []}, "messages[0].content", "a text or a list of parts"),
    ({"role": "assistant", "content": None, "audio": {"id": "audio_1"}}, "messages[0].audio", "send its transcript as content"),
    ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls", "an assistant's message has them"),
    ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "messages[0].tool_calls[0]", '"name", "arguments"'),
    ({"role": "assistant", "tool_calls": [CALL | {"id": 5}]}, "messages[0].tool_calls[0].id", "a text"),
    ({"role": "user", "content": [{"type": ["text"]}]}, "messages[0].content[0].type", "expected text"),
    ({"role": "robot", "content": "x"}, "messages[0].role", "system, developer, user, assistant, tool"),
]


@pytest.mark.parametrize("message,param,way", BAD, ids=range(len(BAD)))
def test_refusals_say_what_to_send(message: dict[str, Any], param: str, way: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(**message)
    assert caught.value.param == param and way in str(caught.value)


def test_pictures_stay_parts() -> None:
    turn = read(role="tool", tool_call_id="1", content=[{"type": "text", "text": "a screenshot"}, URL])
    assert not turn.is_string and isinstance(turn.parts[1], ImagePart)
