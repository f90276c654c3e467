"""Keys, the bounded queue, deadlines, draining, TLS, CORS: who comes in, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.server.running import RunningServer, chat, running, tiny
from tests.server.test_life import InFlight
from tests.settling import eventually, wait_until
from vlserve.errors import ConfigError
from vlserve.server.admission import Keys, read_keys

KEY, OTHER = "key-one-1234", "key-two-5678"
LONG = chat("hi", max_tokens=480, ignore_eos=True)


def test_keys_from_file_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n")
    assert read_keys(str(path), f"{OTHER}, {KEY}") == (OTHER, KEY)
    assert read_keys(None, None) == ()
    path.write_text("# none\n")
    for wrong in (path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="api_key_file"):
            read_keys(str(wrong), None)


def test_only_a_whole_key_in_bearer_form_is_accepted() -> None:
    keys = Keys([KEY, OTHER])
    assert keys.allow(f"Bearer {KEY}") and keys.allow(f"bearer {OTHER}")
    for wrong in (None, "", KEY, f"Basic {KEY}", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", "Bearer ", "Bearer é\udcff"):
        assert not keys.allow(wrong)
    assert Keys([]).allow(None)


@pytest.fixture(scope="module")
def guarded(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{KEY}\n{OTHER}\n")
    arguments = ("--api-key-file", str(path), "--max-queue", "2", "--max-num-seqs", "2", "--cors-origins", "https://a.example")
    with running(*tiny(checkpoint("qwen2")), *arguments) as server:
        server.wait_ready()
        yield server


KEPT = "resp_none"  # this server keeps no responses
ROUTES = [
    *(("GET", path) for path in ("/version", "/v1/models", "/v1/models/tiny", "/openapi.json", "/metrics")),
    *(("POST", f"/{path}") for path in ("v1/chat/completions", "v1/completions", "v1/responses", "tokenize", "detokenize")),
    *((method, f"/v1/responses/{KEPT}") for method in ("GET", "DELETE")),
    *(("GET", f"/v1/responses/{KEPT}/input_items"), ("POST", f"/v1/responses/{KEPT}/cancel")),
]


@pytest.mark.parametrize("method,path", ROUTES)
def test_every_route_asks_for_a_key(guarded: RunningServer, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong-key"}, {"Authorization": f"Basic {KEY}"}):
        answer = httpx2.request(method, guarded.base + path, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for key in (KEY, OTHER):
        answer = httpx2.request(method, guarded.base + path, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == (200 if method == "GET" and KEPT not in path else 400), answer.text


def test_path_tricks_do_not_go_round_the_key(guarded: RunningServer) -> None:
    host, port = guarded.base.removeprefix("http://").split(":")
    for path in ("//v1/models", "/health/../v1/models", "/v1/models/", "/%761/models", "/v1/models?/health", "/live;/v1/models"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert b"HTTP/1.1 200" not in answer and b'"tiny"' not in answer


def test_health_and_live_ask_for_none(guarded: RunningServer) -> None:
    assert {httpx2.get(guarded.base + path).status_code for path in ("/health", "/live")} == {200}


def test_every_known_route_is_in_the_table_above(guarded: RunningServer) -> None:
    document = httpx2.get(guarded.base + "/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    known = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    places = {"/tiny": "/{model}", KEPT: "{response_id}"}
    asked = set()
    for method, path in ROUTES:
        for value, name in places.items():
            path = path.replace(value, name)
        asked.add((method, path))
    asked.remove(("GET", "/openapi.json"))
    assert known == asked | {("GET", "/health"), ("GET", "/live")}


def test_only_the_named_origin_may_call_from_a_browser(guarded: RunningServer) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    url = guarded.base + "/v1/chat/completions"
    allowed = httpx2.options(url, headers={"Origin": "https://a.example"} | ask)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in httpx2.options(url, headers={"Origin": "https://b.example"} | ask).headers


def test_a_full_queue_gives_429_and_every_accepted_request_its_answer(guarded: RunningServer) -> None:
    async def all_at_once() -> list[httpx2.Response]:
        limits = httpx2.Limits(max_connections=60)
        async with httpx2.AsyncClient(timeout=300, limits=limits, headers={"Authorization": f"Bearer {KEY}"}) as client:
            body = chat("hi", max_tokens=16, ignore_eos=True)
            return await asyncio.gather(
                *(client.post(guarded.base + "/v1/chat/completions", json=body | {"stream": i % 2 == 0}) for i in range(60))
            )

    answers = asyncio.run(all_at_once())
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429} and codes.count(200) >= 4
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["type"] == "rate_limit_error" and int(answer.headers["retry-after"]) >= 1
        else:
            assert '"finish_reason":"length"' in answer.text

    def ask_for_five() -> httpx2.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx2.post(guarded.base + "/v1/chat/completions", json=chat("hi", n=5), headers=headers, timeout=60)

    answer = eventually(ask_for_five, lambda answer: "no room for 4 more" in answer.text)  # once those above have left
    assert answer.status_code == 429


def test_a_deadline_ends_the_request_and_nothing_else(checkpoint: Callable[..., Path]) -> None:
    with running(*tiny(checkpoint("qwen2")), "--request-timeout-s", "0.05", "--max-body-mib", "1") as server:
        server.wait_ready()
        url = server.base + "/v1/chat/completions"
        whole = httpx2.post(url, json=LONG, timeout=60)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "deadline_exceeded"
        with httpx2.stream("POST", url, json=LONG | {"stream": True}, timeout=60) as response:
            lines = [line for line in response.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert httpx2.post(url, content=b"x" * (2**20 + 1)).status_code == 413
        assert httpx2.post(url, content=(b"x" * 2**16 for _ in range(17))).status_code == 413, "without a Content-Length"
        host, port = server.base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\nabc")
            assert connection.recv(100).startswith(b"HTTP/1.1 413"), "before it is sent"
        wait_until(lambda: httpx2.post(url, json=chat("hi", max_tokens=1), timeout=60).status_code == 200)


def test_tls(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost")
    subprocess.run(
        [*make, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    with running(*tiny(checkpoint("qwen2")), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)) as server:
        address = server.wait_for(r"listening on https://(\S+)")[1]
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx2.get(f"https://{address}/live", verify=context).status_code == 200


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--ssl-certfile", "x"), "ssl_keyfile belong together"),
        (("--max-queue", "-1"), "max_queue is -1"),
        (("--drain-seconds", "-1"), "drain_seconds is -1"),
        (("--request-timeout-s", "0"), "request_timeout_s is 0"),
        (("--api-key-file", "/nowhere/keys"), "api_key_file '/nowhere/keys' cannot be read"),
    ],
)
def test_wrong_server_options_are_explained(arguments: tuple[str, ...], message: str) -> None:
    with running("demo", *arguments) as server:
        server.wait_for("error: .*" + message)
        assert server.wait() == 1


def test_a_taken_port_is_said_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "vlserve", "serve", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"cannot listen on 127.0.0.1 port {port}: Address already in use" in done.stderr


def test_many_clients_that_leave_hold_nothing_back_and_sigterm_lets_open_requests_end(checkpoint: Callable[..., Path]) -> None:
    """They leave while sending, waiting, reading; afterwards the queue is as empty as before. After a SIGTERM nobody comes in."""
    options = ("--max-num-seqs", "4", "--max-queue", "500", "--threads", "1")
    with running(*tiny(checkpoint("qwen2")), *options) as server, httpx2.Client(timeout=60) as late:
        server.wait_ready()
        host, port = server.base.removeprefix("http://").split(":")

        def leave(number: int) -> None:
            body = json.dumps(LONG | {"stream": number % 2 == 0}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall((head + body)[: len(head) + len(body) * min(10, number % 20) // 10])
                if number % 3 == 0:
                    connection.settimeout(number / 200)
                    with contextlib.suppress(TimeoutError, BlockingIOError):
                        connection.recv(50)

        threads = [threading.Thread(target=leave, args=(i,)) for i in range(150)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answer: Any = None

        def room_for_all() -> bool:
            nonlocal answer
            answer = httpx2.post(server.base + "/v1/chat/completions", json=chat("hi", max_tokens=2), timeout=120)
            return bool(answer.status_code == 200)

        wait_until(room_for_all)
        assert answer.json()["usage"]["completion_tokens"] == 2

        clients = [InFlight(server) for _ in range(4)]
        for client in clients:
            client.begun.wait(30)
        server.process.send_signal(signal.SIGTERM)
        seen = set()

        def refused() -> bool:
            try:
                answer = late.post(server.base + "/v1/chat/completions", json=chat("hi", max_tokens=1))
            except httpx2.HTTPError:
                return True  # drained and gone already
            seen.add(answer.status_code)
            return answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]

        wait_until(refused)
        assert {client.last() for client in clients} == {"data: [DONE]"}
        assert server.wait() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
        assert seen <= {200, 503}
