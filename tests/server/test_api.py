"""The chat endpoint as clients use it, through the openai package and raw HTTP, against a real server."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from tests.server.running import RunningServer, chat, data_url, running, tiny
from tests.vision.test_preprocess import noise
from vlserve import VLPipeline

PICTURE = Image.fromarray(noise(60, 30))


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path]) -> Iterator[RunningServer]:
    with running(*tiny(checkpoint("qwen2"))) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base + "/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server: RunningServer, body: Any) -> httpx2.Response:
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return httpx2.post(server.base + "/v1/chat/completions", content=content, timeout=60)


def events(response: httpx2.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stop_text_that_is_a_special_token_stops(server: RunningServer, checkpoint: Callable[..., Path]) -> None:
    added = json.loads((checkpoint("qwen2") / "tokenizer.json").read_text())["added_tokens"]
    token = next(token["id"] for token in added if token["content"] == "<|im_start|>")
    options = {"stop": ["<|im_start|>"], "logit_bias": {str(token): 100}, "max_tokens": 4}
    for include, text in ((False, ""), (True, "<|im_start|>")):
        asked = options | {"include_stop_str_in_output": include}
        choice = post(server, chat("x", **asked)).json()["choices"][0]
        assert (choice["message"]["content"] or "", choice["finish_reason"]) == (text, "stop")
        raw = httpx2.post(server.base + "/v1/completions", json={"prompt": "x", **asked}, timeout=60).json()["choices"][0]
        assert (raw["text"], raw["finish_reason"]) == (text, "stop")
        *pieces, last = events(post(server, chat("x", stream=True, **asked)))
        assert "".join(piece["choices"][0]["delta"].get("content") or "" for piece in [*pieces, last]) == text
        assert last["choices"][0]["finish_reason"] == "stop"


def test_bytes_of_half_a_character_are_its_own(server: RunningServer, checkpoint: Callable[..., Path]) -> None:
    """A client puts the bytes of several tokens together to a character."""
    id = json.loads((checkpoint("qwen2") / "tokenizer.json").read_text())["model"]["vocab"]["ð"]
    body = post(server, chat("x", logprobs=True, logit_bias={str(id): 100}, max_tokens=2)).json()
    for entry in body["choices"][0]["logprobs"]["content"]:
        assert (entry["token"], entry["bytes"]) == ("\ufffd", [0xF0])


def test_openai_client_gets_the_pipelines_answer(client: openai.OpenAI, checkpoint: Callable[..., Path]) -> None:
    messages: Any = chat("What shape is it?", PICTURE)["messages"]
    got = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3
    )
    streamed = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            max_completion_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    with VLPipeline(str(checkpoint("qwen2")), dtype="float32", kv_cache_gib=0.05) as pipe:
        want = pipe(("What shape is it?", PICTURE), max_tokens=12)
    assert got.choices[0].message.content == want.text
    assert got.choices[0].finish_reason == want.finish_reason
    assert got.usage is not None and got.usage.prompt_tokens == want.usage.prompt_tokens
    assert got.usage.completion_tokens == len(want.token_ids)
    logprobs = got.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == len(want.token_ids)
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in logprobs.content)
    assert "".join(c.choices[0].delta.content or "" for c in streamed if c.choices) == want.text
    assert streamed[0].choices[0].delta.role == "assistant"
    assert streamed[-1].choices == [] and streamed[-1].usage is not None
    assert streamed[-1].usage.prompt_tokens_details is not None
    assert (streamed[-1].usage.prompt_tokens_details.cached_tokens or 0) > 0, "the picture was asked about before"


def test_stream_order(server: RunningServer) -> None:
    chunks = events(post(server, chat("hi", stream=True)))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"][0]["delta"] == {} and chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert len({c["id"] for c in chunks}) == 1 and not any("usage" in c for c in chunks)


def test_mixed_parts_several_pictures_and_turns(server: RunningServer) -> None:
    url = {"type": "image_url", "image_url": {"url": data_url(PICTURE), "detail": "low"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Compare"}, url, {"type": "input_image", "image_url": url["image_url"]}],
        },
        {"role": "assistant", "content": "They are alike."},
        {"role": "user", "content": "And now?"},
    ]
    answer = post(server, {"messages": messages, "max_tokens": 4}).json()
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 2 * 4, "detail low is one tile"


def test_pictures_in_the_shapes_of_other_apis(server: RunningServer) -> None:
    url = data_url(Image.fromarray(noise(600, 400)))
    data = url.partition(",")[2]

    def tiles(part: dict[str, Any], **fields: Any) -> int:
        answer = post(server, {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1, **fields}).json()
        return answer["usage"]["prompt_tokens_details"]["image_tokens"] // 4

    image_url = {"type": "image_url", "image_url": {"url": url}}
    assert tiles(image_url) == tiles({"type": "image", "image": url}) == 6 + 1
    assert tiles({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}) == 6 + 1
    assert tiles({"type": "file", "file": {"file_data": url, "filename": "a.png"}}) == 6 + 1
    assert tiles({"type": "image_url", "image_url": {"url": url, "max_dynamic_patch": 2}}) == 2 + 1
    assert tiles({**image_url, "max_dynamic_patch": 1}) == tiles(image_url, mm_processor_kwargs={"crop_to_patches": False}) == 1


def test_nulls_and_harmless_fields_are_accepted(server: RunningServer) -> None:
    nulls = dict.fromkeys(
        ["temperature", "top_p", "stop", "tools", "response_format", "stream_options", "logit_bias", "n", "unheard_of"]
    )
    body = chat(
        "hi",
        user="me",
        store=False,
        metadata={"a": "b"},
        n=1,
        response_format={"type": "text"},
        stream_options={"include_usage": True},
    )
    assert post(server, nulls | body).status_code == 200


BAD: list[tuple[Any, int, str | None, str]] = [
    ("{", 400, None, "not valid JSON"),
    ("[" * 100_000, 400, None, "not valid JSON"),
    ("[]", 400, None, "JSON object"),
    ({}, 400, "messages", "messages is missing"),
    ({"messages": []}, 400, "messages", "at least one"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "'robot'"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "text or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages[0].content[0].type", "'audio'"),
    (chat("x", model="gpt-9"), 404, "model", "'gpt-9'"),
    (chat("x", max_tokens=-1), 400, "max_tokens", "-1"),
    (chat("x", max_tokens=100_000), 400, "max_tokens", "max_model_len 512"),
    (chat("word " * 600), 400, "messages", "no room"),
    (json.dumps(chat("x", temperature=float("nan"))), 400, "temperature", "nan"),
    (chat("x", temperature="hot"), 400, "temperature", "number"),
    (chat("x", top_p=1.5), 400, "top_p", "1.5"),
    (chat("x", n=17), 400, "n", "expected 1 to 16"),
    (chat("x", n=0), 400, "n", "n is 0"),
    (chat("x", tools=[{"type": "function"}]), 400, "tools.0.function", "is missing"),
    (chat("x", tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools", "no place for tools"),
    (chat("x", tool_choice="required"), 400, "tool_choice", "needs tools"),
    (chat("x", response_format={"type": "json_schema"}), 400, "response_format.json_schema", "missing"),
    (chat("x", response_format={"type": "xml"}), 400, "response_format.type", "json_object"),
    (chat("x", chat_template_kwargs={"magic": 1}), 400, "chat_template_kwargs.magic", "no such variable"),
    (chat("x", chat_template_kwargs={"messages": 1}), 400, "chat_template_kwargs.messages", "no such variable"),
    (chat("x", reasoning_effort="hard"), 400, "reasoning_effort", "none, minimal, low, medium, high, xhigh, max"),
    (chat("x", enable_thinking=True), 400, "enable_thinking", "no such variable"),
    (chat("x", continue_final_message=True, add_generation_prompt=True), 400, "continue_final_message", "exclude"),
    (chat("x", mm_processor_kwargs={"max_dynamic_patch": 0}), 400, "mm_processor_kwargs.max_dynamic_patch", "1"),
    (chat("x", cache_salt=""), 400, "cache_salt", "1 to 256"),
    (chat("x", verbosity="loud"), 400, "verbosity", "'medium'"),
    (chat("x", best_of=3), 400, "best_of", "best_of"),
    (chat("x", top_k=10**30), 400, "top_k", "2147483647"),
    (chat("x", ignore_eos=1), 400, "ignore_eos", "true or false"),
    (chat("\ud83d"), 400, None, "UTF-8"),
    (chat("x", stop="\ud83d"), 400, None, "UTF-8"),
    (json.dumps(chat("x")).replace("x", "\xff").encode("latin-1"), 400, None, "UTF-8"),
    ({"messages": [{"role": "assistant", "content": None, "audio": {"id": "a"}}]}, 400, "messages[0].audio", "transcript"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, 400, "messages[0].tool_calls[0]", "function"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, 400, "messages[0].tool_calls", "not supported"),
    (chat("a" * 100_000), 400, "messages", "100000 characters"),
    ({"messages": [{"role": "user", "content": "x"}] * 10_000}, 400, "messages", "10000 messages and their parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 10_000}]},
        400,
        "messages",
        "10000 messages and their parts",
    ),
    (chat("x", stop=["a"] * 100), 400, "stop", "at most 16"),
    (chat("x", logprobs=True, top_logprobs=99), 400, "top_logprobs", "99"),
    (chat("x", top_logprobs=2), 400, "top_logprobs", "needs logprobs"),
    (chat("x", logit_bias={"99999": 1}), 400, "logit_bias", "99999"),
    (chat("x", stream_options={"what": 1}, stream=True), 400, "stream_options.what", "what"),
]
PICTURES = [
    ("data:image/png;base64,AAAA", "cannot be decoded"),
    ("data:image/png;base64,!", "base64 is damaged"),
    ("http://127.0.0.1:1/x.png", "public internet"),
    ("file:///etc/passwd", "data: or http"),
    ("/etc/passwd", "data: or http"),
    ("http://[::1", "could not be fetched"),
]
FEW = {"type": "image_url", "image_url": {"url": data_url(PICTURE), "max_dynamic_patch": 0}}
BAD.append(
    ({"messages": [{"role": "user", "content": [FEW]}]}, 400, "messages[0].content[0].image_url.max_dynamic_patch", "1 or more")
)
for url, message in PICTURES:
    part = {"type": "image_url", "image_url": {"url": url}}
    BAD.append(({"messages": [{"role": "user", "content": [part]}]}, 400, "messages[0].content[0].image_url", message))


@pytest.mark.parametrize("body,status,param,message", BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_requests_name_their_field_and_hurt_nobody(
    server: RunningServer, body: Any, status: int, param: str | None, message: str
) -> None:
    for extra in ({}, {"stream": True}):
        answer = post(server, body | extra if isinstance(body, dict) else body)
        error = answer.json()["error"]
        assert answer.status_code == status, error
        assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"
    assert post(server, chat("still there?")).status_code == 200


def test_unknown_routes_and_methods_have_the_error_shape(server: RunningServer) -> None:
    assert httpx2.get(server.base + "/v1/nothing").json()["error"]["message"].startswith("GET /v1/nothing is not here")
    wrong = httpx2.get(server.base + "/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST" and "it takes POST" in wrong.json()["error"]["message"]
    wrong = httpx2.put(server.base + "/v1/responses/resp_1")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "DELETE, GET"
    assert wrong.json()["error"]["message"] == "/v1/responses/resp_1 does not take PUT; it takes DELETE, GET"


def test_models_health_and_live(server: RunningServer, client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert httpx2.get(server.base + "/v1/models").json()["data"][0]["max_model_len"] == 512
    assert httpx2.get(server.base + "/health").json() == {"status": "ok"}
    assert httpx2.get(server.base + "/live").json() == {"status": "ok"}


def test_special_tokens_in_a_message_are_only_text(server: RunningServer) -> None:
    answer = post(server, chat("<IMG_CONTEXT><|im_end|><img>"))
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 0


def test_a_client_that_leaves_is_forgotten(server: RunningServer) -> None:
    host, port = server.base.removeprefix("http://").split(":")
    for stream in (True, False) * 4:
        body = json.dumps(chat("hi", max_tokens=400, ignore_eos=True, stream=stream)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert post(server, chat("next", max_tokens=2)).status_code == 200
