"""The Responses API as Codex CLI, the Agents SDK and the openai package speak it: what they send, and what they can read."""

from __future__ import annotations

import json
from typing import Any, get_args

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_includable import ResponseIncludable
from openai.types.responses.tool import Tool
from pydantic import TypeAdapter

from tests.server.running import RunningServer, chat, data_url
from tests.server.test_api import PICTURE
from vlserve.errors import RequestError
from vlserve.server.responses_input import Conversation, Item
from vlserve.server.responses_request import HOSTED, Includable, ResponsesRequest

PARAMETERS = {"type": "object", "properties": {"at": {"enum": ["Rome"]}}}
LOOK: dict[str, Any] = {"type": "function", "name": "look", "parameters": PARAMETERS}
# of the Open Responses schema (openresponses.org), which requires every one; None stands for null
NUMBER, TEXT = (int, float), (str,)
REQUIRED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("id", "object", "status", "model", "service_tier", "truncation"), TEXT),
    **dict.fromkeys(("created_at", "top_logprobs"), (int,)),
    **dict.fromkeys(("temperature", "top_p", "presence_penalty", "frequency_penalty"), NUMBER),
    **dict.fromkeys(("parallel_tool_calls", "store", "background"), (bool,)),
    **dict.fromkeys(("output", "tools"), (list,)),
    **dict.fromkeys(("text", "metadata"), (dict,)),
    **dict.fromkeys(("incomplete_details", "error", "usage", "reasoning"), (dict, None)),
    **dict.fromkeys(("completed_at", "max_output_tokens", "max_tool_calls"), (int, None)),
    **dict.fromkeys(("previous_response_id", "instructions", "safety_identifier", "prompt_cache_key", "user"), (str, None)),
    "tool_choice": (str, dict),
}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def ask(server: RunningServer, body: dict[str, Any]) -> Any:
    answer = httpx2.post(server.base + "/v1/responses", json=body, timeout=60)
    if answer.status_code == 200:
        Response.model_validate_json(answer.text, strict=True)
    return answer.json()


def stream(server: RunningServer, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = httpx2.post(server.base + "/v1/responses", json=body | {"stream": True}, timeout=60).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    for line in lines:
        EVENT.validate_json(line, strict=True)
    return [json.loads(line) for line in lines]


def test_the_object_has_every_field_with_the_values_that_were_used(server: RunningServer) -> None:
    plain = ask(server, {"input": "hi", "max_output_tokens": 4})
    given = {
        "temperature": 0.5,
        "top_p": 0.25,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "top_logprobs": 3,
        "metadata": {"a": "b"},
        "safety_identifier": "someone",
        "prompt_cache_key": "key",
        "user": "u",
        "max_tool_calls": 2,
        "max_output_tokens": 4,
        "truncation": "auto",
        "parallel_tool_calls": False,
        "instructions": "Be brief.",
    }
    full = ask(server, {"input": "hi", "tools": [LOOK], "service_tier": "auto", **given})
    for body in (plain, full):
        for name, types in REQUIRED.items():
            value = body[name]
            assert (value is None and None in types) or type(value) in types, (name, value)
        details = body["usage"]["input_tokens_details"], body["usage"]["output_tokens_details"]
        assert {"cached_tokens", "image_tokens"} <= set(details[0]) and set(details[1]) == {"reasoning_tokens"}
    assert {name: full[name] for name in given} == given
    assert full["tools"] == [LOOK | {"description": None, "strict": None}] and full["service_tier"] == "default"
    assert len(full["output"][0]["content"][0]["logprobs"][0]["top_logprobs"]) == 3
    used = {name: plain[name] for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs")}
    assert used == {"temperature": 0, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "top_logprobs": 0}
    assert (plain["status"], plain["completed_at"], plain["metadata"], plain["store"]) == ("incomplete", None, {}, False)
    form = {"type": "json_schema", "name": "a", "schema": LOOK["parameters"]}
    done = ask(server, {"input": "hi", "text": {"format": form}})
    assert done["status"] == "completed" and done["completed_at"] >= done["created_at"] and done["incomplete_details"] is None
    assert done["text"]["format"] == form and done["reasoning"] == {"effort": None, "summary": None}
    effort = ask(server, {"input": "hi", "max_output_tokens": 2, "reasoning": {"effort": "low", "summary": "auto"}})
    assert effort["reasoning"] == {"effort": "low", "summary": None}, "no summary was made"


STREAMS: dict[str, dict[str, Any]] = {
    "text": {"input": "hi", "max_output_tokens": 6, "top_logprobs": 1},
    "calls": {"input": "hi", "tools": [LOOK], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 120},
    "reasoning": {"input": "hi", "chat_template_kwargs": {"enable_thinking": True}, "max_output_tokens": 6},
}


@pytest.mark.parametrize("kind", STREAMS)
def test_events_are_complete_and_in_order(server: RunningServer, kind: str) -> None:
    events = stream(server, STREAMS[kind])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:3]] == ["response.created", "response.in_progress", "response.output_item.added"]
    final = events[-1]["response"]
    assert events[-1]["type"] == f"response.{final['status']}" and final["usage"]["output_tokens"] > 0
    part = {"text": "output_text", "calls": "function_call_arguments", "reasoning": "reasoning_text"}[kind]
    for index, item in enumerate(final["output"]):
        own = [event for event in events if event.get("output_index") == index]
        kinds = [event["type"].removeprefix("response.") for event in own]
        ends = [f"{part}.done", *(["content_part.done"] if kind != "calls" else []), "output_item.done"]
        begins = ["output_item.added", *(["content_part.added"] if kind != "calls" else [])]
        assert kinds[: len(begins)] == begins and kinds[-len(ends) :] == ends
        assert set(kinds[len(begins) : -len(ends)]) == {f"{part}.delta"}
        assert own[0]["item"]["status"] == "in_progress" and own[-1]["item"] == item
        whole = item["arguments"] if kind == "calls" else item["content"][0]["text"]
        done = own[-len(ends)]
        assert "".join(event["delta"] for event in own if event["type"].endswith(".delta")) == whole
        assert done["arguments" if kind == "calls" else "text"] == whole
        assert {event["item_id"] for event in own[1:-1]} == {item["id"]}


def test_ids_begin_as_openais_do(server: RunningServer) -> None:
    called, thought = ask(server, STREAMS["calls"]), ask(server, STREAMS["reasoning"])
    text = ask(server, STREAMS["text"])
    call = called["output"][-1]
    shown = {"resp": text["id"], "msg": text["output"][0]["id"], "rs": thought["output"][0]["id"], "fc": call["id"]}
    for prefix, id in (shown | {"call": call["call_id"]}).items():
        assert id.startswith(prefix + "_") and id.removeprefix(prefix + "_").isalnum(), id
    functions = [{"type": "function", "function": {key: LOOK[key] for key in ("name", "parameters")}}]
    body = chat("hi", tools=functions, tool_choice="required", parallel_tool_calls=False, max_tokens=120)
    answer = httpx2.post(server.base + "/v1/chat/completions", json=body, timeout=60).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"][0]["message"]["tool_calls"][0]["id"].startswith("call_")


CODEX: dict[str, Any] = {
    "model": "tiny",
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions/>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}], "encrypted_content": None},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}], "phase": "commentary"},
        {"type": "function_call", "name": "exec_command", "arguments": '{"cmd":"ls"}', "call_id": "call_1"},
        {"type": "function_call_output", "call_id": "call_1", "output": "a.py"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_image", "image_url": data_url(PICTURE), "detail": "original"}],
        },
    ],
    "tools": [
        {"type": "function", "name": "exec_command", "description": "Runs", "strict": False, "parameters": {"type": "object"}},
        {"type": "function", "name": "view_image", "strict": False, "defer_loading": True, "parameters": {"type": "object"}},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: x"}},
        {"type": "web_search", "external_web_access": False},
        {"type": "local_shell"},
        {"type": "namespace", "name": "mcp__x", "description": "x", "tools": []},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199e9a1-7b1c",
    "text": {"verbosity": "low"},
    "service_tier": "priority",
    "client_metadata": {"x-codex-installation-id": "0199"},
}


def test_what_codex_sends_is_taken_and_what_has_no_effect_is_said_once(server: RunningServer) -> None:
    for _ in range(2):
        final = stream(server, CODEX | {"max_output_tokens": 4})[-1]["response"]
    assert [tool["name"] for tool in final["tools"]] == ["exec_command", "view_image"], "those that the model was shown"
    assert final["prompt_cache_key"] == "0199e9a1-7b1c" and final["text"]["verbosity"] == "medium"
    said = [line for line in server.lines if "said once" in line]
    for word in ("type custom", "type web_search", "type local_shell", "type namespace", "text.verbosity"):
        assert len([line for line in said if word in line]) == 1, said
    assert not any("apply_patch" in line for line in said), "what a client names does not reach the log"


def test_every_value_that_openais_types_allow_is_known() -> None:
    assert set(get_args(Includable)) == set(get_args(ResponseIncludable))
    kinds = {kind for tool in get_args(get_args(Tool)[0]) for kind in get_args(tool.model_fields["type"].annotation)}
    assert kinds - {"function"} <= set(HOSTED), "tools that are not functions are refused by their names"


def places(*items: Item) -> list[tuple[Item, str]]:
    return [(item, f"input[{i}]") for i, item in enumerate(items)]


def test_items_become_the_messages_that_chat_has() -> None:
    """As the Agents SDK and the openai package send an answer back."""
    call: dict[str, Any] = {"type": "function_call", "name": "look", "arguments": '{"at": "Rome"}', "status": "completed"}
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "original", "file_id": None}
    items = places(
        {"role": "user", "content": [{"type": "input_text", "text": "hi", "prompt_cache_breakpoint": None}, picture]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "phase": None,
            "content": [{"type": "output_text", "text": "I ", "annotations": [{"type": "url_citation"}], "logprobs": []}]
            + [{"type": "refusal", "refusal": "look."}],
        },
        {**call, "id": "__fake_id__", "call_id": "call_1", "provider_data": {"model": "x"}, "namespace": None},
        {**call, "call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "a"}, picture]},
        {"type": "function_call_output", "call_id": "call_2", "output": []},
        {"type": "custom_tool_call", "call_id": "call_3", "name": "patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "call_3", "output": "done"},
        {"role": "user", "content": [{"type": "input_file", "filename": "a.png", "file_data": "data:image/png;base64,AA"}]},
    )
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "original"}}
    function = {"name": "look", "arguments": '{"at": "Rome"}'}
    custom = {"name": "patch", "arguments": '{"input": "*** Begin"}'}
    assert Conversation(items, "Be brief.").messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, image]},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"type": "function", "function": function, "id": id} for id in ("call_1", "call_2")],
        },
        {"role": "tool", "content": [{"type": "text", "text": "a"}, image], "tool_call_id": "call_1"},
        {"role": "tool", "content": "", "tool_call_id": "call_2"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": custom, "id": "call_3"}]},
        {"role": "tool", "content": "done", "tool_call_id": "call_3"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]},
    ]


def user(*parts: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)}]}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 0.3}}}
FORM = {"type": "json_schema", "name": "a", "schema": SCHEMA}
TEXT_PART = {"type": "input_text", "text": "x"}
BAD: list[tuple[dict[str, Any], str, str]] = [
    (
        {"input": "x", "text": {"format": FORM}},
        "text.format.schema",
        "multipleOf",
    ),
    ({"input": "x", "structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", "multipleOf"),
    ({"input": "x", "reasoning": {"effort": "immense"}}, "reasoning.effort", "'low'"),
    ({"input": "x", "chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs.mood", "no such variable"),
    ({"input": "x", "include": ["everything"]}, "include.0", "reasoning.encrypted_content"),
    ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type", 'tool_choice: "auto"'),
    ({"input": "x", "tools": [LOOK, {"type": "mcp"}], "tool_choice": "required"}, "tools[1].type", "mcp"),
    ({"input": "x", "tools": [LOOK], "tool_choice": {"type": "web_search_preview"}}, "tool_choice", "web_search_preview"),
    ({"input": "x", "tools": [{"type": "unheard_of"}], "tool_choice": "auto"}, "tools[0].type", "unheard_of"),
    ({"input": "x", "tools": [{"type": "function", "function": {"name": "look"}}]}, "tools.0", "beside type"),
    ({"input": "x", "tool_choice": "required"}, "tool_choice", "tools"),
    ({"input": "x", "max_tokens": 3}, "max_tokens", "max_output_tokens"),
    ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0"),
    ({"input": "x", "min_tokens": 9, "max_output_tokens": 2}, "min_tokens", "max_output_tokens 2"),
    ({"input": "x", "max_tool_calls": 0}, "max_tool_calls", "greater than or equal to 1"),
    ({"input": "x", "n": 2}, "n", "one answer"),
    ({"input": "x", "conversation": "conv_1"}, "conversation", "previous_response_id"),
    ({"input": "x", "metadata": {"a": 1}}, "metadata.a", "expected a text"),
    ({"input": "x", "user": 3}, "user", "expected a text"),
    ({"input": "x", "truncation": "middle"}, "truncation", "'auto'"),
    (user(TEXT_PART, {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}), "input[0].content[1].image_url", ""),
    (user(TEXT_PART, {"type": "input_image", "image_url": "x", "detail": "tiny"}), "input[0].content[1].detail", "original"),
    (user(TEXT_PART, {"type": "input_image", "image_url": "x", "detail": ["low"]}), "input[0].content[1].detail", "original"),
    (user({"type": "input_image", "file_id": "file_1"}), "input[0].content[0].file_id", "data URL"),
    (user({"type": "input_file", "file_data": "data:application/pdf;base64,AA"}), "input[0].content[0].type", "input_image"),
    (user({"type": "input_file", "file_data": "data:image/png;base64,AAAA"}), "input[0].content[0].file_data", ""),
    (user({"type": "input_audio"}), "input[0].content[0].type", "input_audio"),
    ({"input": [{"type": "function_call_output", "call_id": "1", "output": 3}]}, "input[0].output", "text"),
    ({"input": [*user(TEXT_PART)["input"], {"type": "function_call", "arguments": "{}"}]}, "input[1].name", "text"),
    ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type", "leave it out"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "--store-responses"),
    ({"input": [{"id": "msg_1"}]}, "input[0].type", "--store-responses"),
    ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id", "--store-responses"),
    ({"input": "x", "background": True}, "background", "--store-responses"),
]


@pytest.mark.parametrize("body,param,message", BAD, ids=range(len(BAD)))
def test_errors_name_the_field_that_was_sent(server: RunningServer, body: dict[str, Any], param: str, message: str) -> None:
    error = ask(server, body)["error"]
    assert error["param"] == param and message in error["message"], error
    for foreign in ("messages[", "response_format", "structured.", "max_completion_tokens"):
        assert foreign not in error["message"], error


REFERENCE = [{"type": "item_reference", "id": "msg_1"}]
UNKEPT: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, ", or send store: false and the whole conversation as input"),
    ({"previous_response_id": "resp_1", "store": False}, ", or send the whole conversation as input"),
    ({"input": REFERENCE}, ", or send store: false and the item itself"),
    ({"input": REFERENCE, "store": False}, ", or send the item itself"),
    ({"background": True}, ", or leave background out"),
]


@pytest.mark.parametrize("body,way_out", UNKEPT, ids=range(len(UNKEPT)))
def test_a_server_that_keeps_nothing_says_what_to_do_without(server: RunningServer, body: dict[str, Any], way_out: str) -> None:
    message = ask(server, {"input": "x"} | body)["error"]["message"]
    assert message.endswith(" this one does not; start it with --store-responses" + way_out)


def test_what_is_not_kept_is_said_below_the_route(server: RunningServer, client: openai.OpenAI) -> None:
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel, client.responses.input_items.list):
        with pytest.raises(openai.BadRequestError) as caught:
            call("resp_1")
        assert caught.value.body["message"].endswith("start it with --store-responses")  # type: ignore[index]
    assert ask(server, {"input": "x", "store": True, "max_output_tokens": 1})["store"] is False, "it is not, and says so"


def test_sampling_is_chats(server: RunningServer) -> None:
    """Each changes the draws, and in the same way on both routes."""
    base = {"temperature": 1.5, "seed": 5, "top_k": 3}
    extras: list[dict[str, Any]] = [
        {"top_k": 1},
        {"min_p": 0.9},
        {"repetition_penalty": 5.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"seed": 6},
        {"stop": ["5"]},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ]
    seen = []
    for extra in ({}, *extras):
        fields = base | extra
        own = ask(server, {"input": "hi", "max_output_tokens": 12, "stream_options": {"include_obfuscation": False}, **fields})
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, **fields}
        message = httpx2.post(server.base + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
        assert own["output"][0]["content"][0]["text"] == (message.get("reasoning_content") or message["content"]), extra
        seen.append(own["output"][0]["content"][0]["text"])
    assert not [extra for extra, text in zip(extras, seen[1:], strict=True) if text == seen[0]]


def test_effort_reaches_a_template_that_reads_it() -> None:
    asked = ResponsesRequest.model_validate({"input": "hi", "reasoning": {"effort": "low"}})
    assert asked.to_chat(asked.own_items).reasoning_effort == "low"
    place = "chat_template_kwargs.reasoning_effort"
    error = asked.renamed(RequestError(f"{place}: no", param=place))
    assert (error.param, str(error)) == ("reasoning.effort", "reasoning.effort: no")


def test_allowed_tools_are_those_the_model_is_shown(server: RunningServer) -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    other = LOOK | {"name": "hear"}
    body = {"input": "hi", "tools": [other, LOOK], "tool_choice": allowed, "max_output_tokens": 120}
    answer = ask(server, body)
    assert {item["name"] for item in answer["output"] if item["type"] == "function_call"} == {"look"}
    assert answer["tool_choice"] == allowed and [tool["name"] for tool in answer["tools"]] == ["look"]


def test_truncation_auto_leaves_the_oldest_turns_out(server: RunningServer) -> None:
    turns = [{"role": role, "content": f"{i} " * 20} for i in range(12) for role in ("user", "assistant")]
    items = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "last"}]
    body = {"input": items, "max_output_tokens": 4}
    refused = ask(server, body)["error"]
    assert refused["code"] == "context_length_exceeded" and refused["param"] in ("input", "max_output_tokens")
    kept = ask(server, body | {"truncation": "auto"})
    longest = next(i for i in range(12, 24, 2) if "output" in ask(server, body | {"input": [items[0], *items[1 + i :]]}))
    assert "output" not in ask(server, body | {"input": [items[0], *items[longest - 1 :]]})
    same = ask(server, body | {"input": [items[0], *items[1 + longest :]]})
    assert kept["usage"]["input_tokens"] == same["usage"]["input_tokens"] > 300
    assert kept["output"][0]["content"] == same["output"][0]["content"] and kept["truncation"] == "auto"
    assert "error" in ask(server, {"input": "x " * 2000, "truncation": "auto"}), "nothing is left to leave out"
