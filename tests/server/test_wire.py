"""The bytes on the wire: streams as curl sees them, nulls, and what errors and the log may say."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.running import RunningServer, chat, running, tiny
from tests.server.test_api import PICTURE
from tests.settling import wait_until


def curl(server: RunningServer, path: str, body: Any) -> tuple[list[str], bytes]:
    """The lines of the head, and the body's bytes, of what curl gets for a POST."""
    got = subprocess.run(
        ["curl", "-sS", "-N", "-i", server.base + path, "-H", "Content-Type: application/json", "--data-binary", "@-"],
        input=json.dumps(body).encode(),
        capture_output=True,
        check=True,
        timeout=120,
    ).stdout
    head, _, rest = got.partition(b"\r\n\r\n")
    return head.decode("ascii").lower().split("\r\n"), rest


def chunks(stream: bytes) -> list[dict[str, Any]]:
    """Of a stream that consists of `data: {...}` and an empty line each, then [DONE], and of nothing else."""
    assert stream.endswith(b"\n\ndata: [DONE]\n\n") and b"\r" not in stream
    *events, done, nothing = stream.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    for event in events:
        assert event.startswith(b"data: {") and event.endswith(b"}") and b"\n" not in event
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def test_a_whole_answer(server: RunningServer) -> None:
    head, body = curl(server, "/v1/chat/completions", chat("What shape is it?", PICTURE))
    assert head[0] == "http/1.1 200 ok" and "content-type: application/json" in head
    assert f"content-length: {len(body)}" in head
    answer = json.loads(body)
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage"]
    assert answer["system_fingerprint"].startswith("vlserve-") and answer["service_tier"] == "default"
    assert set(answer["usage"]["completion_tokens_details"]) >= {"reasoning_tokens", "accepted_prediction_tokens"}
    head, body = curl(server, "/v1/chat/completions", {"messages": 1})
    assert head[0] == "http/1.1 400 bad request" and "content-type: application/json" in head
    assert list(json.loads(body)["error"]) == ["message", "type", "param", "code"]


@pytest.mark.parametrize("usage", (None, False, True))
def test_a_stream_of_chat(server: RunningServer, usage: bool | None) -> None:
    options = {} if usage is None else {"stream_options": {"include_usage": usage}}
    body = chat("What shape is it?", PICTURE, stream=True, **options)
    head, stream = curl(server, "/v1/chat/completions", body)
    assert head[0] == "http/1.1 200 ok" and "content-type: text/event-stream; charset=utf-8" in head
    first, *deltas = chunks(stream)
    if usage:
        last = deltas.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 8
        assert all(chunk["usage"] is None for chunk in (first, *deltas))
    else:
        assert not any("usage" in chunk for chunk in (first, *deltas))
    end = deltas.pop()
    shape = {"index": 0, "logprobs": None, "finish_reason": None}
    assert first["choices"] == [shape | {"delta": {"role": "assistant", "content": ""}}]
    assert end["choices"] == [shape | {"delta": {}, "finish_reason": "length"}]
    for chunk in deltas:
        (choice,) = chunk["choices"]
        assert choice == shape | {"delta": {"content": choice["delta"]["content"]}} and choice["delta"]["content"]
    envelopes = {(c["id"], c["object"], c["created"], c["model"]) for c in (first, *deltas, end)}
    assert len(envelopes) == 1 and "chat.completion.chunk" in envelopes.pop()
    _, whole = curl(server, "/v1/chat/completions", body | {"stream": False})
    content = json.loads(whole)["choices"][0]["message"]["content"]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in deltas) == content


def test_a_stream_of_raw_text(server: RunningServer) -> None:
    head, stream = curl(
        server,
        "/v1/completions",
        {"prompt": "It is", "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}},
    )
    assert "content-type: text/event-stream; charset=utf-8" in head
    *texts, end, last = chunks(stream)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 5
    assert all(c["choices"][0]["finish_reason"] is None and c["usage"] is None for c in texts)
    assert end["choices"][0]["finish_reason"] == "length" and end["usage"] is None
    assert {c["object"] for c in (*texts, end, last)} == {"text_completion"}


def test_a_stream_of_a_response(server: RunningServer) -> None:
    head, stream = curl(server, "/v1/responses", {"input": "hi", "max_output_tokens": 4, "stream": True})
    assert "content-type: text/event-stream; charset=utf-8" in head
    *events, nothing = stream.split(b"\n\n")
    assert nothing == b"" and b"[DONE]" not in stream
    for number, event in enumerate(events):
        name, data = event.split(b"\n")
        body = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + body["type"].encode() and body["sequence_number"] == number
    assert body["type"] == "response.incomplete"


NEEDED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat("hi", max_completion_tokens=2),
    "/v1/completions": {"prompt": "It is"},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
}


def fields(document: dict[str, Any], path: str) -> dict[str, Any]:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    found: dict[str, Any] = document["components"]["schemas"][body.rpartition("/")[2]]["properties"]
    return found


def test_null_is_not_given_in_every_field(server: RunningServer) -> None:
    document = httpx2.get(server.base + "/openapi.json").json()
    assert NEEDED.keys() == {path for path, ways in document["paths"].items() if "requestBody" in ways.get("post", {})}
    for path, needed in NEEDED.items():
        nulls = dict.fromkeys(fields(document, path)) | {"a_field_of_next_year": None}
        answer = httpx2.post(server.base + path, json=nulls | needed, timeout=60)
        assert answer.status_code == 200, (path, answer.text)
        if "stream" in nulls:
            streamed = httpx2.post(server.base + path, json=nulls | needed | {"stream": True}, timeout=60)
            assert streamed.status_code == 200 and '"error":{' not in streamed.text, (path, streamed.text)


@pytest.mark.parametrize("path", ("/v1/chat/completions", "/v1/completions"))
def test_stream_options_without_a_stream_are_no_error(server: RunningServer, path: str) -> None:
    body = NEEDED[path] | {"stream_options": {"include_usage": True, "continuous_usage_stats": None}}
    for stream in ({}, {"stream": False}, {"stream": None}):
        answer = httpx2.post(server.base + path, json=body | stream, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    "path,body", [("/v1/chat/completions", chat("hi", max_tokens=3)), ("/v1/completions", {"prompt": "It is"})]
)
def test_usage_as_it_grows(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    body = body | {"max_tokens": 3, "ignore_eos": True, "stream": True}
    *running, last = chunks(
        curl(server, path, body | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}})[1]
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in running]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] == 3
    assert {chunk["usage"]["prompt_tokens"] for chunk in running} == {last["usage"]["prompt_tokens"]}
    if "messages" in body:
        assert counts[0] == 0, "the chunk before the first token"
    for options in ({"include_usage": False, "continuous_usage_stats": True}, {"continuous_usage_stats": True}):
        assert not any("usage" in chunk for chunk in chunks(curl(server, path, body | {"stream_options": options})[1]))


KEY, WRONG_KEY = "key-that-is-right", "key-that-is-wrong"
SECRET = "confidential-words"  # in every failing request below, and nowhere else
BAD_PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + SECRET.encode()).decode()
LEAKS = {
    "a traceback": r"Traceback|File \"",
    "an object's address": r"0x[0-9a-fA-F]{6,}",
    "a path of this machine": r"/(?:usr|home|root|tmp|etc|var|opt|work|proc|nix)/",
    "a refused host's address": r"\b(?:127\.0\.0\.[1-9]|10\.\d+\.\d+\.\d+|169\.254\.\d+\.\d+)\b|::1\b",
    "a name of Python's": r"<class |vlserve\.\w+\.\w+|\w+Error\(|PIL\.|msgspec|pydantic|Errno",
}


def pictured(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


FAILING: dict[str, tuple[str, Any, int]] = {
    "bad JSON": ("/v1/chat/completions", b'{"messages": ' + SECRET.encode(), 400),
    "not UTF-8": ("/v1/chat/completions", b'{"messages": "\xff"}', 400),
    "another form": ("/v1/chat/completions", {"messages": {SECRET: SECRET}}, 400),
    "a wrong type": ("/v1/chat/completions", chat("x", temperature=SECRET), 400),
    "half a character": ("/v1/chat/completions", b'{"messages": "\\ud83d"}', 400),
    "deep nesting": ("/v1/chat/completions", b"[" * 100_000, 400),
    "unknown model": ("/v1/chat/completions", chat("x", model="gpt-9"), 404),
    "damaged picture": ("/v1/chat/completions", pictured(BAD_PNG), 400),
    "damaged base64": ("/v1/chat/completions", pictured("data:image/png;base64,%"), 400),
    "loopback": ("/v1/chat/completions", pictured(f"http://127.0.0.1:1/{SECRET}"), 400),
    "loopback by name": ("/v1/chat/completions", pictured(f"http://localhost:1/{SECRET}"), 400),
    "loopback as a number": ("/v1/chat/completions", pictured(f"http://2130706433/{SECRET}"), 400),
    "loopback, IPv6": ("/v1/chat/completions", pictured(f"http://[::1]/{SECRET}"), 400),
    "private": ("/v1/chat/completions", pictured(f"http://10.1.2.3/{SECRET}"), 400),
    "metadata": ("/v1/chat/completions", pictured("http://169.254.169.254/latest/meta-data"), 400),
    "a local file": ("/v1/chat/completions", pictured(f"file:///etc/{SECRET}"), 400),
    "a path": ("/v1/chat/completions", pictured(f"/etc/{SECRET}"), 400),
    "no scheme that is known": ("/v1/chat/completions", pictured(f"gopher://x/{SECRET}"), 400),
    "a long prompt": ("/v1/chat/completions", chat("word " * 600), 400),
    "a wrong schema": (
        "/v1/chat/completions",
        chat("x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": SECRET[:5]}}}),
        400,
    ),
    "a wrong regex": ("/v1/chat/completions", chat("x", structured_outputs={"regex": "(?<"}), 400),
    "a wrong grammar": ("/v1/chat/completions", chat("x", structured_outputs={"grammar": "root ::= ("}), 400),
    "a wrong variable": ("/v1/chat/completions", chat("x", chat_template_kwargs={"what": 1}), 400),
    "a responses item": ("/v1/responses", {"input": [{"type": "item_reference", "id": SECRET}]}, 400),
    "a raw prompt": ("/v1/completions", {"prompt": [10**9]}, 400),
    "tokens": ("/detokenize", {"tokens": [-1]}, 400),
    "nothing to tokenize": ("/tokenize", {}, 400),
    "too large": ("/v1/chat/completions", b"x" * (2**20 + 1), 413),
    "no such route": (f"/v2/{SECRET}", {}, 404),
}


@pytest.fixture(scope="module")
def guarded(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    keys = tmp_path_factory.mktemp("guarded") / "keys"
    keys.write_text(KEY)
    options = ("--api-key-file", str(keys), "--max-body-mib", "1", "--log-level", "debug")
    with running(*tiny(checkpoint("qwen2")), *options) as server:
        server.wait_ready()
        yield server


def test_failures_tell_nothing_about_the_machine_and_the_log_nothing_about_requests(guarded: RunningServer) -> None:
    bodies = {}
    for name, (path, body, status) in FAILING.items():
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        for key, want in ((KEY, status), (WRONG_KEY, 404 if "no such" in name and status == 404 else 401)):
            headers = {"Authorization": f"Bearer {key}", "X-Secret": SECRET}
            answer = httpx2.post(guarded.base + path, content=content, headers=headers, timeout=60)
            assert answer.status_code == want, (name, answer.text)
            bodies[f"{name}, {key}"] = answer.text
    found = [(what, name, text) for what, leak in LEAKS.items() for name, text in bodies.items() if re.search(leak, text)]
    assert not found
    assert not [text for text in bodies.values() if KEY in text or WRONG_KEY in text]
    wait_until(lambda: sum("route=" in line for line in guarded.lines) >= 2 * len(FAILING) - 2, "a line for each request")
    first = next(i for i, line in enumerate(guarded.lines) if "is ready (" in line)
    lines = guarded.lines[first + 1 :]
    assert lines and not [(what, line) for what, leak in LEAKS.items() for line in lines if re.search(leak, line)]
    assert not [line for line in lines if SECRET in line or KEY in line or WRONG_KEY in line or "169.254" in line]
