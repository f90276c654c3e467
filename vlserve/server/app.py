"""The routes. `router(pipeline)` plugs into any FastAPI app and carries error shapes and disconnects itself.

No request logic lives here: reading is protocol's, answering the pipeline's.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import vlserve
from vlserve.config import SamplingParams
from vlserve.errors import EngineError, RequestError
from vlserve.messages import read_messages
from vlserve.outputs import Delta
from vlserve.pipeline import VLPipeline, collect
from vlserve.prompt import Prompt
from vlserve.server import protocol
from vlserve.server.metrics import Metrics

log = logging.getLogger(__name__)
INTERNAL_ERROR = "internal error; the server's log says more"
MAX_BODY_BYTES = 64 * 2**20
T = TypeVar("T")


def create_app(pipeline: VLPipeline, *, model_name: str | None = None) -> FastAPI:
    """The whole server as an app; the pipeline is closed when the app shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(pipeline.close)

    app = FastAPI(title="vlserve", version=vlserve.__version__, lifespan=lifespan, openapi_url=None)
    app.include_router(router(pipeline, model_name=model_name))

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        message = f"{request.method} {request.url.path} is not here"
        return JSONResponse(protocol.error_dict(message, kind="invalid_request_error", code="not_found"), status)

    return app


def router(pipeline: VLPipeline, *, model_name: str | None = None) -> APIRouter:
    """OpenAI's chat completions, the model list, and health, for `app.include_router`.

    Args:
        model_name: the id in the API; default: the pipeline's model as it was given.
    """
    name = model_name or pipeline.config.model
    metrics = Metrics(pipeline, name)
    routes = APIRouter(route_class=metrics.watched(_Route))
    routes.get("/metrics")(metrics.expose)
    defaults = protocol.sampling_defaults(pipeline.checkpoint.generation)
    created = int(time.time())

    @routes.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/health")
    async def health() -> Response:
        client = pipeline.client
        if client.error is not None:
            return JSONResponse({"status": "failed", "message": str(client.error)}, 503)
        if client.ready is None:
            stage = client.stage
            return JSONResponse({"status": "loading", "stage": stage.name, "done": stage.done, "total": stage.total}, 503)
        if client.is_overdue:
            return JSONResponse({"status": "overdue", "message": "the running step takes longer than it may"}, 503)
        return JSONResponse({"status": "ok"})

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        ready = pipeline.client.ready
        model = {"id": name, "object": "model", "created": created, "owned_by": "vlserve"}
        return {"object": "list", "data": [model | {"max_model_len": ready.max_model_len if ready else None}]}

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = protocol.read_chat_request(await _read_body(request))
        if asked.model not in (None, name):
            raise RequestError(
                f"the model {asked.model!r} is not served here; {name!r} is", param="model", code="model_not_found"
            )
        sampling = asked.sampling(defaults)
        turns = read_messages(asked.messages, local=False)
        include_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        id = protocol.new_id()
        if pipeline.client.ready is None or pipeline.client.error is not None:
            raise EngineError(_why_not_ready(pipeline))
        if asked.stream:
            prompt = await pipeline.prepare(turns)
            pipeline.check(prompt, sampling)  # before the 200 is sent
            events = _stream(pipeline, prompt, sampling, id, name, include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

        async def answer() -> list[Delta]:
            return [delta async for delta in pipeline.answer(await pipeline.prepare(turns), sampling)]

        done = collect(await _unless_disconnected(request, answer()))
        message = {"role": "assistant", "content": done.text, "refusal": None}
        logprobs = protocol.logprobs_dict(done.logprobs, pipeline.tokenizer)
        return JSONResponse(protocol.completion(id, name, message, done.finish_reason, logprobs, done.usage))

    return routes


async def _stream(
    pipeline: VLPipeline, prompt: Prompt, sampling: SamplingParams, id: str, name: str, include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events: the role, the pieces, the reason, usage when asked for, [DONE]; an error event on failure."""
    yield _event(protocol.chunk(id, name, {"role": "assistant", "content": ""}))
    usage = None
    try:
        async for delta in pipeline.answer(prompt, sampling):
            usage = delta.usage
            logprobs = protocol.logprobs_dict(delta.logprobs, pipeline.tokenizer)
            if delta.text or logprobs:
                yield _event(protocol.chunk(id, name, {"content": delta.text}, logprobs=logprobs))
            if delta.finish_reason is not None:
                yield _event(protocol.chunk(id, name, {}, delta.finish_reason))
    except EngineError as error:
        yield _event(protocol.error_dict(str(error), kind="server_error", code="engine_error"))
        return
    except Exception:
        log.exception("a stream failed")
        yield _event(protocol.error_dict(INTERNAL_ERROR, kind="server_error"))
        return
    if include_usage and usage is not None:
        yield _event(protocol.usage_chunk(id, name, usage))
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _why_not_ready(pipeline: VLPipeline) -> str:
    client = pipeline.client
    return str(client.error) if client.error is not None else f"the model is still loading (stage: {client.stage.name})"


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the request's body has more than {MAX_BODY_BYTES} bytes", code="body_too_large")
    return bytes(body)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; when the client goes away first, the work is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        return await task
    finally:
        watcher.cancel()
        task.cancel()


class _Route(APIRoute):
    """Turns our errors into OpenAI's error objects, wherever the router is included."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestError as error:
                status = {"model_not_found": 404, "body_too_large": 413}.get(error.code, 400)
                body = protocol.error_dict(str(error), kind="invalid_request_error", param=error.param, code=error.code)
                return JSONResponse(body, status)
            except EngineError as error:
                body = protocol.error_dict(str(error), kind="server_error", code="engine_error")
                return JSONResponse(body, 503, {"Retry-After": "5"})
            except (HTTPException, RequestValidationError):  # the including app's own
                raise
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it
            except asyncio.CancelledError:
                if asyncio.current_task() is not None and await request.is_disconnected():
                    return Response(status_code=499)
                raise
            except Exception:
                log.exception("%s %s failed", request.method, request.url.path)
                return JSONResponse(protocol.error_dict(INTERNAL_ERROR, kind="server_error"), 500)

        return handler
