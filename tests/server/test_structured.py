"""Structured answers over HTTP: JSON, schemas, regular expressions, and function calls."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.running import RunningServer, chat
from tests.server.test_routes import post


class Seen(BaseModel):
    shape: Literal["circle", "square"]
    number: int = Field(ge=0, le=9)


def tool(name: str, **extra: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema, **extra}}


def answer(server: RunningServer, **fields: Any) -> Any:
    return post(server, "/v1/chat/completions", chat("hi", temperature=1.0, **{"max_tokens": 200, **fields}))


def test_a_schema_and_parse(server: RunningServer, client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is it?"}]
    for seed in range(3):
        parsed = client.chat.completions.parse(model="tiny", messages=messages, response_format=Seen, temperature=1, seed=seed)
        assert isinstance(parsed.choices[0].message.parsed, Seen) and parsed.choices[0].finish_reason == "stop"
    form: Any = {"format": {"type": "json_schema", "name": "seen", "schema": Seen.model_json_schema()}}
    response = client.responses.create(model="tiny", input="hi", text=form, temperature=1)
    Seen.model_validate_json(response.output_text)
    assert response.status == "completed"


def test_other_forms(server: RunningServer) -> None:
    words = answer(server, structured_outputs={"choice": ["yes", "no"]}, n=4)["choices"]
    assert {choice["message"]["content"] for choice in words} <= {"yes", "no"}
    number = answer(server, structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"})["choices"][0]["message"]["content"]
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", number)
    found = answer(server, response_format={"type": "json_object"}, max_tokens=400)["choices"][0]
    assert found["finish_reason"] == "length" or isinstance(json.loads(found["message"]["content"]), dict)
    raw = post(server, "/v1/completions", {"prompt": "x", "structured_outputs": {"choice": ["left", "right"]}})
    assert raw["choices"][0]["text"] in ("left", "right")


def test_a_call_that_must_come(server: RunningServer, client: openai.OpenAI) -> None:
    tools: Any = [tool("weather"), tool("time")]
    messages: Any = [{"role": "user", "content": "hi"}]
    choice: Any = {"type": "function", "function": {"name": "time"}}
    whole = client.chat.completions.create(
        model="tiny", messages=messages, tools=tools, tool_choice=choice, temperature=1, seed=1
    )
    assert whole.choices[0].finish_reason == "tool_calls" and whole.choices[0].message.content is None
    (call,) = whole.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "time"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1,
            seed=3,
            stream=True,
        )
    )
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function is not None and deltas[0].function.name in ("weather", "time") and deltas[0].id
    assert len(deltas) > 2 and not any(delta.id for delta in deltas[1:]), "arguments stream"
    arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
    assert json.loads(arguments)["city"] in ("Paris", "Rome") and chunks[-1].choices[0].finish_reason == "tool_calls"
    flat: Any = [{"type": "function", **tool("weather")["function"]}]
    response = client.responses.create(model="tiny", input="hi", tools=flat, tool_choice="required", temperature=1)
    kinds = [item.type for item in response.output]
    assert "function_call" in kinds


def test_no_call_where_none_is_asked(server: RunningServer) -> None:
    got = answer(server, tools=[tool("weather")], tool_choice="none", max_tokens=5)["choices"][0]
    assert "tool_calls" not in got["message"]
    plain = post(server, "/tokenize", {"messages": chat("hi")["messages"]})["count"]
    assert answer(server, tools=[tool("weather")], tool_choice="none", max_tokens=1)["usage"]["prompt_tokens"] == plain


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "what"}}}}, "response_format", "what"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format", "not"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"grammar": "root ::= "}}, "structured_outputs.grammar", "grammar"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "exclude"),
    ({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
    ({"tools": [tool("f")] * 129}, "tools", "the limit is 128"),
    ({"tools": [tool("bad name")]}, "tools.0.function.name", "pattern"),
]


@pytest.mark.parametrize("fields,param,message", BAD, ids=range(len(BAD)))
def test_wrong_forms_are_refused_by_their_field(server: RunningServer, fields: dict[str, Any], param: str, message: str) -> None:
    for stream in (False, True):
        error = answer(server, stream=stream, **fields)["error"]
        assert error["param"].startswith(param) and message in error["message"], error
    assert "choices" in answer(server, max_tokens=1)
