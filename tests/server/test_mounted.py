"""The router inside somebody else's FastAPI app: our errors stay OpenAI's, theirs stay theirs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel

import vlserve
from tests.pipeline.test_local import OPTIONS
from tests.server.running import chat
from tests.server.test_api import BAD, events
from tests.settling import PATIENCE_S, wait_until
from vlserve import VLPipeline
from vlserve.config import ServerConfig

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
KEY = {"Authorization": "Bearer key-of-the-router"}


class Order(BaseModel):
    amount: int


def make_host() -> FastAPI:
    """An app with routes and error shapes of its own."""
    app = FastAPI()

    def answers(kind: type[Exception], status: int) -> None:
        @app.exception_handler(kind)
        async def handle(request: Request, error: Exception) -> JSONResponse:
            return JSONResponse({"host": kind.__name__}, getattr(error, "status_code", status))

    answers(RequestValidationError, 418)
    answers(HTTPException, 400)
    answers(Exception, 500)

    @app.post("/orders")
    def order(order: Order) -> int:
        return order.amount

    @app.get("/teapot")
    def teapot() -> None:
        raise HTTPException(409)

    @app.get("/broken")
    def broken() -> None:
        raise KeyError("the host's own")

    return app


@pytest.fixture(scope="module")
def pipe(checkpoint: Callable[..., Path]) -> Iterator[VLPipeline]:
    with VLPipeline(str(checkpoint("qwen2")), **OPTIONS) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def client(pipe: VLPipeline) -> Iterator[TestClient]:
    app = make_host()
    app.include_router(vlserve.router(pipe, ServerConfig(served_model_name="tiny")), prefix="/ai")
    locked = ServerConfig(served_model_name="locked", api_keys=("key-of-the-router",))
    app.include_router(vlserve.router(pipe, locked), prefix="/locked")
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, body: Any, prefix: str = "/ai", **headers: str) -> httpx2.Response:
    content = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return client.post(prefix + "/v1/chat/completions", content=content, headers=headers)


@pytest.mark.parametrize("body,status,param,message", BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_requests_get_openai_errors(client: TestClient, body: Any, status: int, param: str | None, message: str) -> None:
    for extra in ({}, {"stream": True}):
        answer = post(client, body | extra if isinstance(body, dict) else body)
        error = answer.json()["error"]
        assert answer.status_code == status, error
        assert error["param"] == param and message in error["message"] and error["type"] == "invalid_request_error"


def test_good_requests_are_answered(client: TestClient) -> None:
    whole = post(client, chat("hi")).json()
    streamed = events(post(client, chat("hi", stream=True)))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed)
    assert whole["model"] == "tiny" and whole["choices"][0]["message"]["content"] == text


def test_what_breaks_inside_is_still_ours(client: TestClient, pipe: VLPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(pipe, "check", broken)
    answer = post(client, chat("hi"))
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error" and "secret" not in answer.text


def test_the_host_keeps_its_routes_and_error_shapes(client: TestClient) -> None:
    assert client.post("/orders", json={"amount": 3}).json() == 3
    refused = client.post("/orders", json={"amount": "many"})
    assert (refused.status_code, refused.json()) == (418, {"host": "RequestValidationError"})
    assert (client.get("/teapot").status_code, client.get("/teapot").json()) == (409, {"host": "HTTPException"})
    assert (client.get("/broken").status_code, client.get("/broken").json()) == (500, {"host": "Exception"})
    assert "x-request-id" not in client.get("/teapot").headers
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/orders", "/ai/v1/chat/completions", "/ai/health"} <= paths.keys()


def test_keys_guard_the_router_and_nothing_else(client: TestClient) -> None:
    for path in ("/locked/v1/models", "/locked/metrics", "/locked/version"):
        refused = client.get(path)
        assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key", path
        assert client.get(path, headers=KEY).status_code == 200, path
    assert post(client, chat("hi"), "/locked").status_code == 401
    assert post(client, chat("hi"), "/locked", **KEY).json()["model"] == "locked"
    for path in ("/locked/health", "/locked/live", "/ai/v1/models"):
        assert client.get(path).status_code == 200, path
    assert client.post("/orders", json={"amount": 3}).status_code == 200


def test_health_and_metrics_work_under_the_prefix(client: TestClient) -> None:
    assert client.get("/ai/health").json() == client.get("/ai/live").json() == {"status": "ok"}
    post(client, chat("hi"))
    metrics = client.get("/ai/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert re.search(r'vlserve:http_requests_total\{[^}]*route="/v1/chat/completions",status="200"\} [1-9]', metrics.text)
    assert "/orders" not in metrics.text and client.get("/metrics").status_code == 404


def test_the_example_runs() -> None:
    process = subprocess.Popen([sys.executable, str(EXAMPLES / "own_app.py"), "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        base = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        reader = threading.Thread(target=list, args=(lines,), daemon=True)  # so that the process never waits for us
        reader.start()
        wait_until(lambda: httpx2.get(base + "/ai/health").status_code == 200)
        assert [model["id"] for model in httpx2.get(base + "/ai/v1/models").json()["data"]] == ["demo"]
        picture = (EXAMPLES / "pictures/shapes.png").read_bytes()
        assert httpx2.post(base + "/caption", content=picture, timeout=PATIENCE_S).json()["caption"]
        refused = httpx2.post(base + "/caption", content=b"no picture")
        assert refused.status_code == 400 and "problem" in refused.json()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
    reader.join(PATIENCE_S)
    process.stderr.close()
