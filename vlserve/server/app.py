"""The routes. `router(pipeline)` plugs into any FastAPI app and is complete by itself: error shapes, keys,
admission, request ids and disconnects come with it.

No request logic lives here: bodies are read by protocol.py and a file for each API, and the pipeline answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.routing import Match

import vlserve
from vlserve.config import SamplingParams, ServerConfig
from vlserve.errors import EngineError, RequestError
from vlserve.pipeline.outputs import Delta
from vlserve.pipeline.vl_pipeline import VLPipeline
from vlserve.prompt.build import Prompt
from vlserve.prompt.chat_messages import read_messages
from vlserve.server import openapi, protocol, streams
from vlserve.server.admission import Admission, Keys
from vlserve.server.chat import ChatAnswer, ChatRequest, ForPrompt
from vlserve.server.completions import CompletionAnswer, CompletionRequest
from vlserve.server.content import read_content
from vlserve.server.guard import route_class, told
from vlserve.server.http_edge import HttpEdge, plain_path
from vlserve.server.metrics import Metrics
from vlserve.server.responses import Responses
from vlserve.server.responses_request import ResponsesRequest
from vlserve.server.streams import Answer, EventResponse, events, late_events, merge, unless_disconnected
from vlserve.server.tokenize import DetokenizeRequest, TokenizeRequest

BODY_SECONDS = 120
LATER = {"Retry-After": "5"}
BODIES: dict[str, Any] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
Prepared = tuple[list[Prompt], Sequence[SamplingParams]]  # prompts, and the parameters that each is answered with


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request comes to: prompts being prepared, the parameters each is answered with, what the answer must look like.

    `run` answers at once and goes on in the background; `for_prompt` makes the parameters ones that know their prompt.
    """

    preparing: Sequence[Coroutine[Any, Any, Prompt]]
    params: Sequence[SamplingParams]
    make: Callable[[Sequence[Prompt]], Answer]
    run: Callable[[Any, Any, ExitStack], Response] | None = None
    for_prompt: ForPrompt | None = None


def create_app(pipeline: VLPipeline, config: ServerConfig | None = None) -> FastAPI:
    """The whole server as an app; the pipeline is closed when the app shuts down."""
    config = config or ServerConfig()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(pipeline.close)

    app = FastAPI(title="vlserve", version=vlserve.__version__, lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    routes = router(pipeline, config)
    app.state.admission = routes.admission  # type: ignore[attr-defined]
    routes.add_api_route("/openapi.json", lambda: openapi.document(routes, tuple(BODIES.values())), include_in_schema=False)
    app.include_router(routes)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
            allow_private_network=True,  # a public page that may call, may call here too, where "here" is a private address
        )
    app.add_middleware(HttpEdge)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(request: Request, error: Exception) -> Response:
        if getattr(error, "status_code", 404) == 405:
            matching = [route for route in routes.routes if route.matches(request.scope)[0] is not Match.NONE]
            allowed = ", ".join(sorted({method for route in matching for method in getattr(route, "methods", None) or ()}))
            message = f"{request.url.path} does not take {request.method}; it takes {allowed or 'another method'}"
            body = protocol.error_dict(message, kind="invalid_request_error", code="method_not_allowed")
            return JSONResponse(body, 405, {"Allow": allowed})
        message = f"{request.method} {request.url.path} is not here; the API is at /v1, /openapi.json describes it"
        return JSONResponse(protocol.error_dict(message, kind="invalid_request_error", code="not_found"), 404)

    return app


def router(pipeline: VLPipeline, config: ServerConfig | None = None) -> APIRouter:
    """OpenAI's API for one model, for `app.include_router(vlserve.router(pipeline), prefix=...)`.

    Of `config`, the fields that concern requests count: keys, queue, timeout, body size, the model's id.
    """
    config = config or ServerConfig()
    keys = Keys(config.api_keys)
    api = _Api(pipeline, config, keys)
    metrics = Metrics(pipeline, api.name)
    api.on_asked = metrics.asked
    routes = APIRouter(route_class=metrics.watched(route_class(keys)))
    routes.admission = api.admission  # type: ignore[attr-defined]
    routes.add_api_route("/metrics", metrics.expose, methods=["GET"], **openapi.read_route("/metrics"))
    for path, answer in (("/live", api.live), ("/health", api.health), ("/version", api.version), ("/v1/models", api.models)):
        routes.add_api_route(path, answer, methods=["GET"], **openapi.read_route(path))
    routes.add_api_route("/v1/models/{model:path}", api.model, methods=["GET"], **openapi.read_route("/v1/models/{model}"))
    handlers = (api.chat, api.completions, api.responses, api.tokenize, api.detokenize)
    for (path, kind), handle in zip(BODIES.items(), handlers, strict=True):
        routes.add_api_route(path, handle, methods=["POST"], **openapi.body_route(path, kind))
    kept = api.kept
    below: Sequence[tuple[str, str, Callable[..., Any]]] = (
        ("GET", "/v1/responses/{response_id}", kept.retrieve),
        ("DELETE", "/v1/responses/{response_id}", kept.delete),
        ("GET", "/v1/responses/{response_id}/input_items", kept.input_items),
        ("POST", "/v1/responses/{response_id}/cancel", kept.cancel),
    )
    for method, path, handler in below:
        routes.add_api_route(path, handler, methods=[method], **openapi.read_route(path))
    return routes


class _Api:
    """The routes' functions."""

    def __init__(self, pipeline: VLPipeline, config: ServerConfig, keys: Keys) -> None:
        self.pipeline, self.config = pipeline, config
        self.name = config.served_model_name or pipeline.config.model
        self.kept = Responses(pipeline, config, keys, self.name)
        self.admission = Admission(pipeline.config.max_num_seqs + config.max_queue)
        self._defaults = protocol.sampling_defaults(pipeline.checkpoint.generation)
        self.on_asked: Callable[[Sequence[SamplingParams]], None] = lambda params: None
        self._created = protocol.now()
        self._permission = protocol.model_permission(self._created)

    async def live(self) -> dict[str, str]:
        """Whether the server's process lives."""
        return {"status": "ok"}

    async def health(self) -> Response:
        """Whether requests are answered: 200, or 503 with the reason."""
        client = self.pipeline.client
        if client.error is not None:
            return JSONResponse({"status": "failed", "message": str(client.error)}, 503, LATER)
        if client.ready is None:
            stage = client.stage
            body = {"status": "loading", "stage": stage.name, "done": stage.done, "total": stage.total}
            ranks = [{"rank": s.rank, "stage": s.name, "seconds": round(seconds, 1)} for s, seconds in client.rank_stages]
            return JSONResponse(body | {"ranks": ranks}, 503, LATER)
        if client.is_overdue:
            return JSONResponse({"status": "overdue", "message": "the running step takes longer than it may"}, 503, LATER)
        if self.admission.is_draining:
            return JSONResponse({"status": "draining", "message": "the server is shutting down"}, 503, LATER)
        return JSONResponse({"status": "ok"})

    async def version(self) -> dict[str, str]:
        return {"version": vlserve.__version__}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, model: str) -> dict[str, Any]:
        if not model.strip("/"):  # /v1/models/ where the router is mounted in another app
            return await self.models()
        if plain_path(f"/{model}") != plain_path(f"/{self.name}"):  # a folder's name loses slashes on its way
            self._check_model(model)
        return self._model()

    async def chat(self, request: Request) -> Response:
        """A chat completion, whole or as server-sent events."""

        def plan(asked: ChatRequest) -> Plan:
            params, turns = asked.params(self._defaults), read_messages(asked.messages, local=False)
            prompt = self.pipeline.prepare(turns, asked.prompt_options())
            tokenizer, name = self.pipeline.tokenizer, self.name
            return Plan([prompt], params, lambda p: ChatAnswer(asked, p[0], tokenizer, name), for_prompt=asked.for_prompt)

        return await self._answer(request, ChatRequest, "messages", plan)

    async def completions(self, request: Request) -> Response:
        """Raw prompts continued, whole or as server-sent events."""

        def plan(asked: CompletionRequest) -> Plan:
            params = asked.params(self._defaults)
            beginning, salt = asked.add_special_tokens is not False, asked.cache_salt or ""
            prompts = [self._raw_prompt(prompt, salt, beginning) for prompt in asked.prompts]
            return Plan(prompts, params, lambda prompts: CompletionAnswer(asked, prompts, self.pipeline.tokenizer, self.name))

        return await self._answer(request, CompletionRequest, "prompt", plan)

    async def responses(self, request: Request) -> Response:
        """A response, whole or as server-sent events, or in the background."""

        def plan(asked: ResponsesRequest) -> Plan:
            prompt, params, make, run, for_prompt = self.kept.plan(request, asked, self._defaults)
            return Plan([prompt], params, make, run, for_prompt)

        return await self._answer(request, ResponsesRequest, "input", plan)

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """The tokens of a text or a conversation."""
        with self.admission.enter(1):
            asked = await self._read(request, TokenizeRequest)
            asked.check()
            if asked.prompt is not None:
                prompt = await self.pipeline.prepare_text(asked.prompt, beginning=asked.add_special_tokens is not False)
            else:
                prompt = await self.pipeline.prepare(read_messages(asked.messages, local=False), asked.prompt_options())
        ids = prompt.token_ids
        tokens = [self.pipeline.tokenizer.raw_token(id) for id in ids] if asked.return_token_strs else None
        return {"count": len(ids), "max_model_len": self._max_model_len(), "tokens": ids, "token_strs": tokens}

    async def detokenize(self, request: Request) -> dict[str, Any]:
        """The text of tokens."""
        with self.admission.enter(1):
            asked = await self._read(request, DetokenizeRequest, "tokens")
            ready = self.pipeline.client.ready
            asked.check(ready.vocab_size if ready else self.pipeline.tokenizer.num_tokens)
            text = await asyncio.to_thread(self.pipeline.tokenizer.decode, asked.tokens, skip_special_tokens=False)
        return {"prompt": text}

    async def _read(self, request: Request, kind: type[protocol.B], *required: str) -> protocol.B:
        try:
            body = await asyncio.wait_for(read_content(request, self.config.max_body_mib * 2**20), BODY_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            raise RequestError(f"the request's body did not arrive within {BODY_SECONDS} s") from None
        asked = protocol.read_body(body, kind, required=required)
        if asked.model is not None:
            self._check_model(asked.model)
        return asked

    async def _answer(
        self, request: Request, kind: type[protocol.A], required: str, plan: Callable[[protocol.A], Plan]
    ) -> Response:
        """Read the request, prepare its prompts, and answer each with every one of its parameters."""
        begun = asyncio.get_running_loop().time()
        with ExitStack() as stack:
            stack.enter_context(self.admission.enter(1))  # before the body is read, so that bodies are bounded too
            asked = await self._read(request, kind, required)
            try:
                planned = plan(asked)
            except RequestError as error:
                raise asked.renamed(error) from None
            try:
                self.pipeline.client.check_alive()
                stack.enter_context(self.admission.enter(len(planned.preparing) * len(planned.params) - 1))
            except EngineError:
                for coroutine in planned.preparing:
                    coroutine.close()
                raise
            preparing = asyncio.ensure_future(self._prepare(asked, planned))
            stack.callback(preparing.cancel)
            preparing.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to look at it

            def begin(prepared: Prepared) -> tuple[Answer, AsyncIterator[tuple[int, Delta]]]:
                prompts, params = prepared
                limit = self.config.request_timeout_s
                left = None if limit is None else max(0.001, limit - (asyncio.get_running_loop().time() - begun))
                pairs = [(prompt, sampling) for prompt in prompts for sampling in params]
                deltas = merge([self.pipeline.answer(prompt, sampling, timeout_s=left) for prompt, sampling in pairs])
                self.on_asked(params)
                return planned.make(prompts), deltas

            is_late = streams.QUIET_S if asked.stream and planned.run is None else None
            done, _ = await unless_disconnected(request, asyncio.wait([preparing], timeout=is_late))
            if not done:  # a stream's silence must not last, so 200 is said before it is known whether there will be an answer
                late = late_events(
                    preparing,
                    lambda prepared: events(*begin(prepared)),
                    lambda error: asked.failure_event(told(error, "preparing an answer")[1]),
                )
                return EventResponse(late, stack.pop_all())
            answer, deltas = begin(preparing.result())
            if planned.run is not None:
                return planned.run(answer, deltas, stack.pop_all())
            if asked.stream:
                return EventResponse(events(answer, deltas), stack.pop_all())

            async def collect() -> dict[str, Any]:
                async for index, delta in deltas:
                    for _ in answer.add(index, delta):
                        pass
                return answer.whole()

            return JSONResponse(await unless_disconnected(request, collect()))

    async def _prepare(self, asked: protocol.AnswerBody, plan: Plan) -> Prepared:
        try:
            prompts = list(await asyncio.gather(*plan.preparing))
            for prompt in prompts:
                self.pipeline.check(prompt, plan.params[0])  # before a 200 is sent
            params = plan.for_prompt(plan.params, prompts[0], self.pipeline.tokenizer) if plan.for_prompt else plan.params
            await self.pipeline.check_structured(params[0])
            return prompts, params
        except RequestError as error:
            raise asked.renamed(error) from None

    async def _raw_prompt(self, prompt: str | list[int], salt: str, beginning: bool) -> Prompt:
        if isinstance(prompt, str):
            ids = (await self.pipeline.prepare_text(prompt, beginning=beginning)).token_ids
        else:
            ids = prompt
            self.pipeline.check_ids(ids)
        return Prompt(ids, [], salt)

    def _model(self) -> dict[str, Any]:
        body = {"id": self.name, "object": "model", "created": self._created, "owned_by": "vlserve"}
        body |= {"root": self.name, "parent": None, "max_model_len": self._max_model_len()}
        return body | {"permission": [self._permission]}

    def _max_model_len(self) -> int | None:
        ready = self.pipeline.client.ready
        return ready.max_model_len if ready else None

    def _check_model(self, name: str) -> None:
        if name != self.name:
            message = f"the model {name[:200]!r} is not served here; {self.name!r} is"
            raise RequestError(message, param="model", code="model_not_found")
