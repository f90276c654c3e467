"""HTTP as proxies, browsers and simple clients speak it: upgrades, encodings, odd paths, early answers, silence, open files."""

from __future__ import annotations

import asyncio
import errno
import gzip
import http.client
import json
import os
import re
import resource
import socket
import urllib.error
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import vlserve
from tests.pipeline.test_local import OPTIONS
from tests.server.running import RunningServer, chat, running, tiny
from tests.settling import eventually, wait_until
from vlserve import VLPipeline
from vlserve.config import ServerConfig
from vlserve.errors import ConfigError, RequestError
from vlserve.server import content, streams
from vlserve.server.admission import Keys, read_keys
from vlserve.server.app import create_app

KEY = {"Authorization": "Bearer short"}
ORIGIN = "https://a.example"


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("short")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    options = ("--api-key-file", str(keys), "--max-body-mib", "1", "--cors-origins", ORIGIN)
    try:
        with running(*tiny(checkpoint("qwen2")), *options) as server:
            server.wait_ready()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            yield server
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def raw(server: RunningServer, request: bytes) -> bytes:
    """All that the server sends until it closes the connection, once all of the request is sent."""
    host, port = server.base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def request(body: bytes, *headers: str, method: str = "POST", path: str = "/v1/chat/completions") -> bytes:
    head = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def test_the_server_and_its_ranks_may_open_many_files(server: RunningServer) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    for pid in (server.process.pid, *(rank.pid for rank in server.ranks())):
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] == wanted  # type: ignore[attr-defined]


def test_a_short_key_is_warned_of_and_an_empty_one_refused(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    wait_until(lambda: any("warning: an API key has fewer than 8 characters" in line for line in server.lines))
    Keys(["long-enough"])
    assert not caplog.records
    with pytest.raises(ConfigError, match="one or more"):
        ServerConfig(api_keys=("",))
    for empty in ("", " , "):
        with pytest.raises(ConfigError, match="VLSERVE_API_KEYS has no key; put one in it, or unset it"):
            read_keys(None, empty)


def test_an_upgrade_to_http_2_keeps_its_body(server: RunningServer) -> None:
    """As `curl --http2` and Java's client ask: the answer is HTTP/1.1, with the body read."""
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
    body = json.dumps(chat("hi", max_tokens=1)).encode()
    sent = request(body, *upgrade, "Authorization: Bearer short").replace(b"Connection: close\r\n", b"")
    host, port = server.base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(sent)
        answer = b""
        while b'"usage"' not in answer:
            answer += (part := connection.recv(65536))
            assert part, answer
    assert answer.startswith(b"HTTP/1.1 200")
    assert not any("WebSocket" in line or "Unsupported upgrade" in line for line in server.lines)


ENCODED = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "deflate, raw": lambda body: zlib.compress(body, wbits=-15),
}


@pytest.mark.parametrize("name", ENCODED)
def test_encoded_bodies_are_decoded_within_the_bodys_bound(server: RunningServer, name: str) -> None:
    def post(body: bytes) -> httpx2.Response:
        headers = {"Content-Encoding": name.partition(",")[0], **KEY}
        return httpx2.post(server.base + "/v1/chat/completions", content=body, headers=headers, timeout=60)

    body = json.dumps(chat("hi", max_tokens=1)).encode()
    assert post(ENCODED[name](body)).status_code == 200
    bomb = post(ENCODED[name](b" " * 2**22 + body))
    assert bomb.status_code == 413 and "more than 1 MiB (the server's --max-body-mib)" in bomb.json()["error"]["message"]
    eventually(lambda: sum("--max-body-mib N" in line for line in server.lines), lambda number: number == 1)
    for wrong in (b"no such thing", ENCODED[name](body)[:-9]):
        error = post(wrong)
        assert error.status_code == 400 and "Content-Encoding" in error.json()["error"]["message"]


def test_other_encodings_are_refused_with_those_that_are_taken(server: RunningServer) -> None:
    for name in ("compress", "gzip, br", "x-unknown"):
        answer = httpx2.post(server.base + "/tokenize", content=b"{}", headers={"Content-Encoding": name, **KEY})
        assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_content_encoding"
        assert "gzip, deflate" in answer.json()["error"]["message"] and "gzip" in answer.headers["accept-encoding"]


@pytest.mark.parametrize("name", ("zstd", "br"))
def test_what_packages_decode_is_bounded_too(name: str) -> None:
    package: Any = pytest.importorskip("zstandard" if name == "zstd" else "brotli")
    if name not in content.known_encodings():
        pytest.skip("an older package, whose output has no bound")
    decode = content._decoders()[name]
    assert decode(package.compress(b"x" * 1000), 2000) == b"x" * 1000
    assert 5000 <= len(decode(package.compress(b"x" * 2**26), 5000)) < 2**17


@pytest.mark.parametrize(
    "path", ("/v1/models/", "//v1/models", "/v1//models//", "/v1/models", "/v1/models/tiny/", "/v1//models/tiny")
)
def test_slashes_too_many(server: RunningServer, path: str) -> None:
    assert b"401 Unauthorized" in raw(server, request(b"", method="GET", path=path))
    answer = raw(server, request(b"", "Authorization: Bearer short", method="GET", path=path))
    assert answer.startswith(b"HTTP/1.1 200") and b'"id":"tiny"' in answer
    head = raw(server, request(b"", "Authorization: Bearer short", method="HEAD", path=path))
    assert head.startswith(b"HTTP/1.1 200") and head.endswith(b"\r\n\r\n")


def test_posts_to_paths_with_slashes_too_many(server: RunningServer) -> None:
    body = json.dumps(chat("hi", max_tokens=1)).encode()
    for path in ("//v1/chat/completions", "/v1//chat/completions", "/v1/chat/completions/"):
        assert raw(server, request(body, "Authorization: Bearer short", path=path)).startswith(b"HTTP/1.1 200"), path


def test_a_models_fields(server: RunningServer) -> None:
    (model,) = httpx2.get(server.base + "/v1/models", headers=KEY).json()["data"]
    assert model["root"] == "tiny" and model["parent"] is None
    assert model["permission"][0]["object"] == "model_permission" and model["permission"][0]["allow_sampling"] is True


EARLY: dict[str, tuple[str, dict[str, str], int]] = {
    "no key": ("/v1/chat/completions", {}, 401),
    "too large": ("/v1/chat/completions", KEY, 413),
    "no such route": ("/v1/chat", KEY, 404),
    "another encoding": ("/v1/chat/completions", {**KEY, "Content-Encoding": "compress"}, 415),
}


@pytest.mark.parametrize("name", EARLY)
def test_clients_that_send_all_of_a_body_first_see_an_early_answer(server: RunningServer, name: str) -> None:
    path, headers, status = EARLY[name]
    body = b"x" * (16 * 2**20)
    try:  # closes its connection after each answer
        urllib.request.urlopen(urllib.request.Request(server.base + path, body, headers), timeout=60)
        raise AssertionError("no error")
    except urllib.error.HTTPError as error:
        with error:
            assert error.code == status and "error" in json.load(error)
    host, port = server.base.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("POST", path, iter([body[: 2**20]] * 16), headers, encode_chunked=True)
    answer = connection.getresponse()
    assert answer.status == status and answer.read() and answer.headers["connection"] == "close"
    connection.close()


def test_a_small_body_that_nobody_read_keeps_the_connection(server: RunningServer) -> None:
    host, port = server.base.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    for _ in range(2):
        connection.request("POST", "/v1/chat/completions", b"x" * 1000)
        answer = connection.getresponse()
        assert answer.status == 401 and answer.read() and "connection" not in answer.headers
    connection.close()


def test_who_waits_for_a_word_before_the_body_is_answered_without_one(server: RunningServer) -> None:
    head = request(b"x" * 2**21, "Expect: 100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    answer = raw(server, head)
    assert answer.startswith(b"HTTP/1.1 401") and b"100 Continue" not in answer


def test_a_page_of_the_named_origin_may_call_into_a_private_network(server: RunningServer) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    for origin in (ORIGIN, "https://b.example"):
        answer = httpx2.options(server.base + "/v1/chat/completions", headers={"Origin": origin} | ask)
        assert (answer.status_code == 200) == (origin == ORIGIN)
        assert ("access-control-allow-origin" in answer.headers) == (origin == ORIGIN)
    allowed = httpx2.options(server.base + "/v1/models", headers={"Origin": ORIGIN} | ask)
    assert allowed.headers["access-control-allow-private-network"] == "true"
    answer = httpx2.get(server.base + "/v1/models", headers={"Origin": ORIGIN} | KEY)
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


def test_connections_stay_open_for_longer_than_proxies_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    from vlserve.server.serve import _Server

    made: list[dict[str, Any]] = []
    monkeypatch.setattr(uvicorn, "Config", lambda app, **options: made.append(options))
    monkeypatch.setattr("vlserve.server.serve.create_app", lambda pipeline, config: FastAPI())
    for config in (ServerConfig(), ServerConfig(keep_alive=620)):
        with pytest.raises(AttributeError):
            _Server(None, config)  # type: ignore[arg-type]
    assert [options["timeout_keep_alive"] for options in made] == [75, 620] and made[0]["http"] == "h11"
    with pytest.raises(ConfigError, match="keep_alive is 0"):
        ServerConfig(keep_alive=0)
    nginx = (Path(__file__).parent.parent.parent / "examples/monitoring/nginx.conf").read_text()
    assert "keepalive_timeout 60s;" in nginx


@pytest.fixture(scope="module")
def pipe(checkpoint: Callable[..., Path]) -> Iterator[VLPipeline]:
    with VLPipeline(str(checkpoint("qwen2")), **OPTIONS) as pipe:
        yield pipe


def test_connections_that_cannot_be_accepted_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio says so for each try, two thousand in a row."""
    from vlserve.server.serve import _LoopErrors

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(_LoopErrors())
    for number in [errno.EMFILE] * 100 + [errno.EINVAL]:
        error = OSError(number, os.strerror(number))
        loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": error})
    loop.close()
    first, other = (record.getMessage() for record in caplog.records)
    assert first.startswith("connections have to wait: the server has too many files") and "ulimit -n" in first
    assert "socket.accept()" in other, "anything else as ever"


STREAMS = {
    "/v1/chat/completions": chat("hi", stream=True),
    "/v1/completions": {"prompt": "It is", "stream": True},
    "/v1/responses": {"input": "hi", "stream": True, "max_output_tokens": 4},
}


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_that_has_nothing_to_say_says_so(pipe: VLPipeline, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "QUIET_S", 0.02)
    answers, prepare, prepare_text = pipe.answer, pipe.prepare, pipe.prepare_text

    async def later(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(0.1)
        async for delta in answers(*arguments, **options):
            yield delta

    async def prepare_later(*arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(0.1)
        return await (prepare_text if path == "/v1/completions" else prepare)(*arguments, **options)

    async def refuse_later(*arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(0.1)
        raise RequestError("the picture did not arrive", param="messages[0].content[0]", code="failed")

    comment = ": keep-alive\n\n"
    with TestClient(create_app(pipe), raise_server_exceptions=True) as client:
        monkeypatch.setattr(pipe, "close", lambda: None)
        monkeypatch.setattr(pipe, "answer", later)
        whole = client.post(path, json=STREAMS[path])
        assert whole.status_code == 200 and comment in whole.text
        told = whole.text.replace(comment, "")
        assert told.startswith(("data: {", "event: response.created\ndata: {")) and told.endswith("\n\n")
        monkeypatch.setattr(pipe, "answer", answers)
        for name in ("prepare", "prepare_text"):
            monkeypatch.setattr(pipe, name, prepare_later)
        late = client.post(path, json=STREAMS[path])
        assert late.status_code == 200 and late.text.startswith(comment)
        assert late.text.rstrip().endswith(("[DONE]", "}")) and '"error":{' not in late.text
        assert client.post(path, json=STREAMS[path] | {"stream": False}).status_code == 200, "without a stream there are none"
        for name in ("prepare", "prepare_text"):
            monkeypatch.setattr(pipe, name, refuse_later)
        refused = client.post(path, json=STREAMS[path])
        assert refused.status_code == 200 and "the picture did not arrive" in refused.text
        event = json.loads(refused.text.replace(comment, "").rpartition("data: ")[2])
        if path == "/v1/responses":
            assert event["type"] == "error" and event["code"] == "failed" and "event: error\n" in refused.text
        else:
            assert event["error"]["type"] == "invalid_request_error" and event["error"]["param"]
        assert client.post(path, json=STREAMS[path] | {"stream": False}).status_code == 400


def test_no_comment_comes_after_the_end_nor_into_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "QUIET_S", 0.01)
    sent: list[dict[str, Any]] = []

    async def said() -> AsyncIterator[bytes]:
        for number in range(3):
            await asyncio.sleep(0.05)
            yield b"data: %d\n\n" % number

    async def send(message: Any) -> None:
        sent.append(message)
        await asyncio.sleep(0.02)  # a slow client

    async def receive() -> Any:
        await asyncio.sleep(60)

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(streams.EventResponse(said(), ExitStack())(scope, receive, send))
    bodies = [message["body"] for message in sent[1:]]
    assert sent[0]["type"] == "http.response.start" and streams.COMMENT in bodies
    assert [body for body in bodies if body != streams.COMMENT] == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n", b""]
    assert bodies[-1] == b"" and not any(message.get("more_body") for message in sent[-1:])


def test_the_router_in_another_app_lists_models_with_a_slash_too(pipe: VLPipeline) -> None:
    app = FastAPI()
    app.include_router(vlserve.router(pipe, ServerConfig(served_model_name="/models/tiny")), prefix="/ai")
    with TestClient(app) as client:
        assert client.get("/ai/v1/models/").json()["data"][0]["id"] == "/models/tiny"
        for path in ("/ai/v1/models//models/tiny", "/ai/v1/models/%2Fmodels%2Ftiny", "/ai/v1/models/models/tiny"):
            assert client.get(path).json()["id"] == "/models/tiny"
        assert client.get("/ai/v1/models/other").status_code == 404
        document = client.get("/openapi.json").json()
        assert document["paths"]["/ai/v1/chat/completions"]


def test_the_document_says_which_fields_are_refused(pipe: VLPipeline) -> None:
    with TestClient(create_app(pipe)) as client:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    body = schemas["ChatRequest"]
    empty = [None, "", [], {}]
    assert body["additionalProperties"] == {"enum": empty} and "unsupported_parameter" in body["description"]
    assert body["properties"]["functions"]["enum"] == empty
    assert (
        body["properties"]["best_of"]["enum"] == [1, *empty]
        and "asks for nothing" in body["properties"]["best_of"]["description"]
    )


@pytest.mark.parametrize(
    "origin", ["example.com", "https://a.example/", "https://A.example", "https://*.example", "https://a,b", ""]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(
        ConfigError, match=f"cors_origins has {re.escape(repr(origin))}; expected .* a scheme .*https://app.example"
    ):
        ServerConfig(cors_origins=(ORIGIN, origin))


def test_origins_that_browsers_send_are_taken() -> None:
    ServerConfig(cors_origins=("*", "null", ORIGIN, "http://localhost:3000", "http://[::1]:80", "chrome-extension://abcdef"))
