"""What bodies are read to, without a server: clients' defaults, values that ask for nothing, types, ranges, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from vlserve.config import SamplingParams
from vlserve.errors import RequestError
from vlserve.server import neutral
from vlserve.server.chat import ChatRequest
from vlserve.server.completions import CompletionRequest
from vlserve.server.protocol import Body, read_body
from vlserve.server.responses_request import ResponsesRequest
from vlserve.server.tokenize import TokenizeRequest

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"messages": MESSAGES}
RAW: dict[str, Any] = {"prompt": "hi"}


def read(body: dict[str, Any]) -> ChatRequest | CompletionRequest:
    if "messages" in body:
        return read_body(json.dumps(body).encode(), ChatRequest, required=["messages"])
    return read_body(json.dumps(body).encode(), CompletionRequest, required=["prompt"])


def params(body: dict[str, Any]) -> list[SamplingParams]:
    return read(body).params({})


def refused(body: dict[str, Any]) -> RequestError:
    asked = None
    with pytest.raises(RequestError) as caught:
        asked = read(body)
        asked.params({})
        if isinstance(asked, ChatRequest):
            asked.prompt_options()
    return caught.value if asked is None else asked.renamed(caught.value)


LMDEPLOY = {
    "model": "tiny",
    "temperature": 0.7,
    "top_p": 1.0,
    "n": 1,
    "stop": None,
    "stream": False,
    "user": None,
    "repetition_penalty": 1.0,
    "session_id": -1,
    "ignore_eos": False,
    "kwargs": {},
}
CLIENTS: dict[str, tuple[dict[str, Any], SamplingParams]] = {
    "LMDeploy's APIClient": (
        LMDEPLOY | {"messages": "hi", "max_tokens": 512, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        SamplingParams(temperature=0.7, max_tokens=512),
    ),
    "LMDeploy's APIClient, raw": (
        LMDEPLOY | RAW | {"suffix": None, "max_tokens": 16, "top_k": 40},
        SamplingParams(temperature=0.7, max_tokens=16, top_k=40),
    ),
    "all of LMDeploy's defaults": (
        CHAT
        | {"logprobs": False, "top_logprobs": 0, "tool_choice": "auto", "parallel_tool_calls": True, "do_preprocess": True}
        | {"repetition_ngram_size": 0, "repetition_ngram_threshold": 0, "skip_special_tokens": True, "session_id": -1}
        | {"spaces_between_special_tokens": False, "min_new_tokens": 3, "return_token_ids": False, "return_logprob": False}
        | {"include_stop_str_in_output": False, "return_routed_experts": False, "repetition_penalty": None, "min_p": None},
        SamplingParams(min_tokens=3),
    ),
    "all of vLLM's defaults": (
        CHAT
        | {"logprobs": False, "top_logprobs": 0, "n": 1, "stop": [], "stream": False, "tool_choice": "none"}
        | {"include_reasoning": True, "parallel_tool_calls": True, "use_beam_search": False, "length_penalty": 1.0}
        | {"stop_token_ids": [], "include_stop_str_in_output": False, "ignore_eos": False, "min_tokens": 0}
        | {"skip_special_tokens": True, "spaces_between_special_tokens": True, "bad_words": [], "echo": False}
        | {"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False, "priority": 0}
        | {"request_id": "1", "routed_experts_prompt_start": 0, "return_token_offsets": False, "return_mm_kwargs": True},
        SamplingParams(),
    ),
    "all of vLLM's defaults, raw": (
        RAW
        | {"echo": False, "max_tokens": 16, "n": 1, "stop": [], "stream": False, "use_beam_search": False}
        | {"length_penalty": 1.0, "stop_token_ids": [], "min_tokens": 0, "spaces_between_special_tokens": True}
        | {"bad_words": [], "add_special_tokens": True, "priority": 0, "request_id": "1", "return_mm_kwargs": True},
        SamplingParams(max_tokens=16),
    ),
    "all of SGLang's defaults": (
        CHAT
        | {"frequency_penalty": 0.0, "logprobs": False, "n": 1, "presence_penalty": 0.0, "stream": False, "tool_choice": "none"}
        | {"return_hidden_states": False, "return_routed_experts": False, "routed_experts_start_len": 0, "min_tokens": 0}
        | {"return_cached_tokens_details": False, "return_prompt_token_ids": False, "return_meta_info": False}
        | {"no_stop_trim": False, "separate_reasoning": True, "stream_reasoning": True, "use_audio_in_video": False, "rid": "1"},
        SamplingParams(),
    ),
    "all of SGLang's defaults, raw": (
        RAW
        | {"top_k": -1, "min_p": 0.0, "max_tokens": 16, "repetition_penalty": 1.0, "no_stop_trim": False, "echo": False}
        | {"return_hidden_states": False, "routed_experts_start_len": 0, "best_of": None, "logprobs": None},
        SamplingParams(top_k=-1, max_tokens=16),
    ),
    "LiteLLM": (CHAT | {"stream": False, "stream_options": {"include_usage": True}, "extra_body": {}}, SamplingParams()),
}


@pytest.mark.parametrize("client", CLIENTS)
def test_what_clients_send_unasked_changes_nothing(client: str) -> None:
    body, want = CLIENTS[client]
    assert params(body) == [want]
    if "messages" in body:
        assert not read(body | {"stream": True}).calls  # type: ignore[union-attr]


@pytest.mark.parametrize("needed", (CHAT, RAW), ids=("chat", "raw"))
@pytest.mark.parametrize("empty", (None, "", [], {}))
def test_empty_values_of_anything_ask_for_nothing(needed: dict[str, Any], empty: Any) -> None:
    names = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *neutral.NEUTRAL, *neutral.INSTEAD, "of_next_year"}
    names -= neutral.MEANT_WHEN_EMPTY
    assert params(dict.fromkeys(names, empty) | needed) == params(needed)


@pytest.mark.parametrize("field", sorted({*neutral.NEUTRAL, *neutral.INSTEAD}))
def test_only_values_that_ask_for_nothing_are_taken_of_what_is_not_supported(field: str) -> None:
    for needed in (CHAT, RAW):
        if field in read(needed).model_fields_set | set(type(read(needed)).model_fields):
            continue
        for value in neutral.NEUTRAL.get(field, ()):
            assert params(needed | {field: value}) == params(needed)
        for value in ("something", 7, True, {"a": 1}):
            if not neutral.is_neutral(field, value):
                error = refused(needed | {field: value})
                assert error.param == field and error.code == "unsupported_parameter"
                assert {**neutral.INSTEAD, **type(read(needed)).instead}.get(field, "leave it out") in str(error)


ADVICE: list[tuple[type[Body], str, str]] = [
    (ResponsesRequest, "response_format", "; here it is text.format"),
    (ResponsesRequest, "guided_json", "; here it is structured_outputs.json"),
    (ResponsesRequest, "ebnf", "; here it is structured_outputs.grammar"),
    (ResponsesRequest, "regex", "; here it is structured_outputs.regex"),
    (ResponsesRequest, "messages", "; here it is input"),
    (ResponsesRequest, "max_new_tokens", "; here it is max_output_tokens"),
    (ResponsesRequest, "reasoning_effort", "; here it is reasoning.effort"),
    (ResponsesRequest, "functions", "; here it is tools"),
    (CompletionRequest, "messages", "; send it to /v1/chat/completions"),
    (CompletionRequest, "tools", "; send it to /v1/chat/completions"),
    (CompletionRequest, "functions", "; send tools to /v1/chat/completions"),
    (CompletionRequest, "image_data", "; send pictures to /v1/chat/completions, as image_url parts of a message"),
    (ChatRequest, "input", "; here it is messages"),
    (ChatRequest, "prompt", "; here it is messages"),
    (ChatRequest, "text", "; here it is messages; text.format is response_format"),
    (ChatRequest, "system", "; send it as a message with the role system"),
    (ChatRequest, "instructions", "; send it as a message with the role system"),
    (ChatRequest, "options", "; send its fields beside the others"),
    (ChatRequest, "num_predict", "; here it is max_tokens"),
    (ChatRequest, "images", "; send pictures as image_url parts of a message"),
    (ChatRequest, "format", "; here it is response_format"),
    (ChatRequest, "raw", "; leave it out"),
    (TokenizeRequest, "content", "; here it is prompt"),
]


@pytest.mark.parametrize("kind,field,advice", ADVICE, ids=[f"{kind.__name__}-{field}" for kind, field, _ in ADVICE])
def test_fields_of_other_routes_and_apis_are_refused_with_this_routes_own(kind: type[Body], field: str, advice: str) -> None:
    needed = next((name for name in ("messages", "prompt", "input") if name in kind.model_fields and name != field), "")
    for body in ({field: "x"}, {field: "x", needed: "hi"}):  # said before what is missing: it is what was meant
        with pytest.raises(RequestError) as caught:
            read_body(json.dumps(body).encode(), kind, required=[needed])
        assert caught.value.args[0] == f"{field} is not a field that is supported{advice}" and caught.value.param == field


def test_a_field_of_another_name_is_refused_with_ours() -> None:
    assert refused(CHAT | {"max_new_tokens": 5}).args[0].endswith("here it is max_tokens)")
    assert refused(CHAT | {"temprature": 1}).args[0].endswith("(did you mean temperature?)")
    assert refused(CHAT | {"of_next_year": False}).args[0] == "of_next_year is not a field that is supported; leave it out"
    assert refused(CHAT | {"web_search_options": {}}).param == "web_search_options", "that is how web search is asked for"
    assert "be left out" in str(refused(CHAT | {"cache_salt": ""}))


TYPES: list[tuple[str, Any, Any]] = [
    ("user", "me", 123),
    ("store", False, "foo"),
    ("service_tier", "flex", "foo"),
    ("safety_identifier", "a", 1),
    ("prompt_cache_key", "a", ["a"]),
    ("prompt_cache_retention", "24h", "1h"),
    ("prediction", {"type": "content", "content": "x"}, "x"),
    ("priority", -1, "high"),
    ("metadata", {"k" * 64: "v" * 512}, {"k" * 65: "v"}),
    ("metadata", {str(i): "v" for i in range(16)}, {str(i): "v" for i in range(17)}),
    ("metadata", {"a": ""}, {"a": "v" * 513}),
    ("spaces_between_special_tokens", False, "no"),
]


@pytest.mark.parametrize("field,right,wrong", TYPES, ids=range(len(TYPES)))
def test_fields_without_influence_have_their_types(field: str, right: Any, wrong: Any) -> None:
    for needed in (CHAT, RAW):
        assert params(needed | {field: right}) == params(needed)
        error = refused(needed | {field: wrong})
        assert error.param == field and "Value error" not in str(error)
    assert "16 keys" in str(refused(CHAT | {"metadata": {str(i): "" for i in range(17)}}))


RANGES: list[tuple[str, list[float], list[float]]] = [
    ("temperature", [0, 2, 2.0], [2.1, -0.1]),
    ("top_p", [0, 0.0, 1], [1.1, -0.1]),
    ("presence_penalty", [-2, 2], [3, -2.1]),
    ("frequency_penalty", [-2, 2], [2.1, -5]),
    ("top_k", [-1, 0, 1], [-2]),
    ("seed", [-1, -(2**63), 2**63 - 1], [2**63]),
    ("max_tokens", [1], [0, -1]),
    ("n", [1, 16], [0, 17]),
]


@pytest.mark.parametrize("field,right,wrong", RANGES, ids=[field for field, _, _ in RANGES])
def test_ranges(field: str, right: list[float], wrong: list[float]) -> None:
    assert params(CHAT | {field: None}) == [SamplingParams()]
    for value in right:
        params(CHAT | {field: value})
    for value in wrong:
        assert refused(CHAT | {field: value}).param == field
        if field != "n":
            with pytest.raises(RequestError):
                SamplingParams(**{field: value})  # type: ignore[arg-type]


WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"stop": 7}, "stop: expected a text or a list of texts"),
    ({"stop": ["a", 7]}, "stop.1: expected a text"),
    ({"temperature": "hot"}, "temperature: expected a number"),
    ({"stream": "yes"}, "stream: expected true or false"),
    ({"n": 1.5}, "n: expected a whole number"),
    ({"tools": {"a": 1}}, "tools: expected a list"),
    ({"tools": [7]}, "tools.0: expected an object"),
    (
        {"stream_options": {"include_usages": True}},
        "stream_options.include_usages is not a field of stream_options; leave it out",
    ),
    ({"service_tier": "gold"}, "service_tier: expected 'auto', 'default', 'flex', 'scale', 'priority', 'fast' or 'ultrafast'"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function is missing"),
    ({"response_format": {"schema": {}}}, "response_format.type is missing"),
    ({"logit_bias": {"5": 101}}, "logit_bias of token 5 is 101.0; expected a number from -100 to 100"),
    ({"logit_bias": {"5": -100.5}}, "logit_bias of token 5 is -100.5; expected a number from -100 to 100"),
]


@pytest.mark.parametrize("fields,message", WRONG_TYPES, ids=range(len(WRONG_TYPES)))
def test_wrong_types_are_told_in_plain_words(fields: dict[str, Any], message: str) -> None:
    error = refused(CHAT | fields)
    assert str(error) == message and str(error).startswith(error.param or "")


def test_an_empty_body_is_called_so() -> None:
    for body in (b"", b" \n"):
        with pytest.raises(RequestError, match="the request's body is empty"):
            read_body(body, ChatRequest, required=["messages"])


def test_values_with_a_settled_meaning() -> None:
    assert SamplingParams(**dict.fromkeys(SamplingParams.__dataclass_fields__)) == SamplingParams()  # type: ignore[arg-type]
    assert params(CHAT | {"seed": -1}) == [SamplingParams()] == [SamplingParams(seed=-1)]
    assert [p.seed for p in params(CHAT | {"seed": -1, "n": 2})] == [None, None]
    assert [p.seed for p in params(CHAT | {"seed": -3, "n": 4})] == [-3, -2, 0, 1], "no choice is without a seed"
    assert params(RAW) == params(RAW | {"max_tokens": None}) == [SamplingParams(max_tokens=16)]
    assert params(RAW | {"max_tokens": 0}) == [SamplingParams(max_tokens=1)] and read(RAW | {"max_tokens": 0}).wants_nothing  # type: ignore[union-attr]
    assert "or none at all" in str(refused(CHAT | {"max_completion_tokens": 0}))
    assert params(RAW | {"logprobs": False}) == params(RAW) and params(RAW | {"logprobs": 0})[0].logprobs == 0
    kwargs = {"seed": 1, "temperature": 0.5}  # as LMDeploy's client passes on what it does not know
    assert params(CHAT | {"kwargs": kwargs, "temperature": 0.7}) == [SamplingParams(seed=1, temperature=0.7)]
    assert refused(CHAT | {"kwargs": {"of_next_year": 1}}).param == "of_next_year"
    assert params(CHAT | {"logprobs": True, "top_logprobs": None})[0].logprobs == 0


def test_errors_have_the_name_that_was_sent() -> None:
    assert refused(CHAT | {"max_completion_tokens": 0}).param == "max_completion_tokens"
    assert refused(RAW | {"max_completion_tokens": -1}).param == "max_completion_tokens"
    assert refused(CHAT | {"min_new_tokens": -1}).param == "min_new_tokens"
    assert refused(CHAT | {"reasoning_effort": "hard"}).param == "reasoning_effort"
    for needed in (CHAT, RAW):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
        asked = read(needed | {"response_format": form})
        assert asked.renamed(RequestError("structured.json: x", param="structured.json")).args == (
            "response_format.json_schema.schema: x",
        )
        asked = read(needed | {"structured_outputs": {"regex": "a"}})
        assert asked.renamed(RequestError("x", param="structured.regex")).param == "structured_outputs.regex"


def test_options_of_a_stream_without_one() -> None:
    for stream in ({}, {"stream": False}):
        for options in ({"include_usage": True}, {"continuous_usage_stats": False}, {}):
            params(CHAT | stream | {"stream_options": options})
        assert "stream: true" in str(refused(CHAT | stream | {"stream_options": {"continuous_usage_stats": True}}))
    params(CHAT | {"stream": True, "stream_options": {"continuous_usage_stats": True}})


def test_tools_reach_the_template_but_for_what_is_for_servers() -> None:
    function = {"name": "look", "parameters": {"type": "object"}, "return": {"type": "string"}}
    noted = {"cache_control": {"type": "ephemeral"}, "defer_loading": False}
    tool = {"function": function | {"strict": True, **noted}, **noted}
    want = {"type": "function", "function": function}
    asked = read(CHAT | {"tools": [tool]})
    assert isinstance(asked, ChatRequest) and list(asked.prompt_options().tools) == [want]
    body = json.dumps(CHAT | {"tools": [tool]}).encode()
    assert list(read_body(body, TokenizeRequest, required=[]).prompt_options().tools) == [want]


def test_a_completion_has_a_format() -> None:
    got = params(RAW | {"response_format": {"type": "json_object"}})[0]
    assert got.structured is not None and replace(got, structured=None) == params(RAW)[0] and got.structured.json_object
    both = RAW | {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
    assert "exclude each other" in str(refused(both))
