"""Structured answers over HTTP: JSON, schemas, regular expressions, and function calls."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any, Literal

import openai
import pytest
import xgrammar
from pydantic import BaseModel, Field

from tests.server.running import RunningServer, chat
from tests.server.test_routes import post
from vlserve.prompt.build import Prompt
from vlserve.server.chat import ChatRequest
from vlserve.structured.grammar import to_grammar


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


STRUCTURES = [{"begin": "<n>", "schema": {"type": "integer", "minimum": 1, "maximum": 3}, "end": "</n>"}]
SPELLINGS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object", "schema": {"enum": [7]}}}, "7"),
    ({"response_format": {"type": "json_object", "schema": '{"enum": [7]}'}}, "7"),
    ({"response_format": {"type": "json_schema", "schema": {"enum": [7]}}}, "7"),
    ({"response_format": {"type": "regex", "regex": "[0-9]{3}"}}, "[0-9]{3}"),
    ({"response_format": {"type": "regex", "pattern": "[0-9]{3}"}}, "[0-9]{3}"),
    ({"response_format": {"type": "regex_schema", "regex_schema": "call me [a-z]{1,9}"}}, "call me [a-z]{1,9}"),
    ({"response_format": {"type": "grammar", "grammar": 'root ::= "ab"'}}, "ab"),
    ({"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "ab"}}}, "ab"),
    ({"response_format": {"type": "structural_tag", "structures": STRUCTURES, "triggers": ["<n>"]}, "max_tokens": 3}, ".*"),
    ({"response_format": {"type": "text"}, "regex": "[0-9]{3}"}, "[0-9]{3}"),
    ({"regex": "[0-9]{3}", "guided_decoding_backend": "outlines", "guided_json": None}, "[0-9]{3}"),
    ({"ebnf": 'root ::= "ab" | "c"'}, "ab|c"),
    ({"grammar": 'root ::= "ab" | "c"'}, "ab|c"),
    ({"json_schema": '{"enum": [7]}'}, "7"),
    ({"json_schema": {"enum": [7]}}, "7"),
    ({"guided_json": {"enum": [7]}}, "7"),
    ({"guided_json": '{"enum": [7]}'}, "7"),
    ({"guided_regex": "^(a|b)$"}, "a|b"),
    ({"guided_choice": ["left", "right"]}, "left|right"),
    ({"guided_grammar": 'root ::= "ab"'}, "ab"),
    ({"structural_tag": {"type": "structural_tag", "format": {"type": "const_string", "value": "ab"}}}, "ab"),
    ({"structured_outputs": {"json": {"enum": [7]}, "disable_any_whitespace": False}}, "7"),
]


def test_other_servers_spellings(server: RunningServer) -> None:
    for fields, pattern in SPELLINGS:
        got = answer(server, **fields)
        assert re.fullmatch(pattern, got["choices"][0]["message"]["content"], re.DOTALL), (fields, got)
        got = post(server, "/v1/completions", {"prompt": "x", "max_tokens": 99, **fields})
        assert re.fullmatch(pattern, got["choices"][0]["text"], re.DOTALL), (fields, got)


def test_calls_that_must_come_win_over_a_format_and_come_alone(server: RunningServer) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7]}}}
    for seed, form in enumerate(({"type": "json_object"}, schema, None, {"type": "text"})):
        got = answer(server, tools=[tool("time")], tool_choice="required", response_format=form, seed=seed, max_tokens=300)
        choice = got["choices"][0]
        assert not choice["message"]["content"] and choice["message"]["tool_calls"], got
        assert all(call["function"]["name"] == "time" for call in choice["message"]["tool_calls"])


def test_a_format_holds_for_text_beside_calls_that_may_come(server: RunningServer) -> None:
    kinds = set()
    for seed in range(6):
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7]}}}
        fields: dict[str, Any] = {"tools": [tool("time", strict=True)], "parallel_tool_calls": False, "seed": seed}
        message = answer(server, response_format=schema, **fields)["choices"][0]["message"]
        calls = message.get("tool_calls", [])
        assert (message["content"] == "7") != bool(calls)
        assert all(json.loads(call["function"]["arguments"]) for call in calls)
        kinds.add(bool(calls))
    assert kinds == {True, False}, "both come"


def test_a_forced_call_that_is_cut_leaves_no_markup(server: RunningServer, client: openai.OpenAI) -> None:
    flat: Any = [{"type": "function", **tool("weather")["function"]}]
    named = {"type": "function", "function": {"name": "weather"}}
    messages: Any = chat("hi")["messages"]
    num_calls = 0
    for seed, most in enumerate((1, 3, 8, 25, 30)):
        fields: Any = {
            "tools": [tool("weather")],
            "tool_choice": named if most % 2 else "required",
            "max_tokens": most,
            "seed": seed,
        }
        got = answer(server, **fields)["choices"][0]
        assert got["finish_reason"] == "length" and not got["message"]["content"], got
        calls = got["message"].get("tool_calls", [])
        assert all(call["function"]["name"] == "weather" for call in calls)
        num_calls += len(calls)
        chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True, temperature=1, **fields))
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "length"
    assert num_calls, "arguments so far are a call"
    response = client.responses.create(
        model="tiny", input="hi", tools=flat, tool_choice="required", max_output_tokens=16, temperature=1
    )
    assert response.status == "incomplete" and response.output_text == ""


@pytest.mark.parametrize("thinking", (True, False))
def test_what_must_come_comes_after_the_reasoning(thinking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the template opened <think>, that part is free; where it did not, a thinking model may before calls alone."""
    monkeypatch.setattr("vlserve.server.chat.is_thinking", lambda *_: thinking)
    monkeypatch.setattr("vlserve.server.chat.knows_thinking", lambda _: True)
    vocabulary = xgrammar.TokenizerInfo([*(bytes([i]) for i in range(256)), b""], stop_token_ids=[256])
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=1)
    call = '<tool_call>\n{"name": "time", "arguments": {"city": "Rome"}}\n</tool_call>'
    calls = {"tools": [tool("time")], "tool_choice": "required"}
    forms: list[tuple[dict[str, Any], str, dict[str, bool]]] = [
        ({"structured_outputs": {"choice": ["yes"]}}, "yes", {"": not thinking, "hm</think>\n\n": thinking}),
        (calls, call, {"": not thinking, "hm</think>": thinking, "<think>hm</think>\n": True, "hm": False}),
        ({"response_format": {"type": "json_object"}, "separate_reasoning": False}, "{}", {"": True, "hm</think>": False}),
    ]
    for fields, text, beginnings in forms:
        asked = ChatRequest.model_validate({"messages": [], **fields})
        (params,) = asked.for_prompt(asked.params({}), Prompt([], [], ""), SimpleNamespace(added={}))  # type: ignore[arg-type]
        assert params.structured is not None
        matcher = xgrammar.GrammarMatcher(compiler.compile_grammar(to_grammar(params.structured)))
        for beginning, fits in beginnings.items():
            matcher.reset()
            assert (matcher.accept_string(beginning + text) and matcher.is_completed()) == fits, (fields, beginning)


def test_no_call_where_none_is_asked(server: RunningServer) -> None:
    got = answer(server, tools=[tool("weather")], tool_choice="none", max_tokens=5)["choices"][0]
    assert "tool_calls" not in got["message"]
    plain = post(server, "/tokenize", {"messages": chat("hi")["messages"]})["count"]
    assert answer(server, tools=[tool("weather")], tool_choice="none", max_tokens=1)["usage"]["prompt_tokens"] == plain


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "what"}}}}, "response_format", "what"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format", "not"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "is empty; leave it out"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"grammar": "root ::= "}}, "structured_outputs.grammar", "grammar"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs", "exclude"),
    ({"guided_json": {"type": "what"}}, "guided_json", "guided_json cannot be used: type is 'what'"),
    ({"regex": "a", "guided_choice": ["b"]}, "guided_choice", "regex and guided_choice exclude each other; give one"),
    ({"ebnf": "root ::= "}, "ebnf", "ebnf cannot be used"),
    ({"guided_whitespace_pattern": "\\n"}, "guided_whitespace_pattern", "put the white space into a regex"),
    ({"response_format": {"type": "json_schema", "schema": {"type": "what"}}}, "response_format.schema", "what"),
    ({"response_format": {"type": "regex", "schema": {}}}, "response_format.schema", "regex takes regex or pattern"),
    ({"response_format": {"type": "regex_schema"}}, "response_format.regex_schema", "is missing"),
    ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.triggers", "is missing"),
    ({"tools": [tool("f")], "tool_choice": "required", "regex": "a"}, "tool_choice", "regex and tool_choice exclude each other"),
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
