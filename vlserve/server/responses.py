"""/v1/responses and what lies below it: a request becomes a plan, kept responses are asked for, cancelled and deleted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from vlserve.config import SamplingParams, ServerConfig
from vlserve.errors import RequestError
from vlserve.prompt.build import Prompt
from vlserve.prompt.chat_messages import read_messages
from vlserve.server.admission import Keys
from vlserve.server.chat import ForPrompt
from vlserve.server.responses_answer import ResponsesAnswer
from vlserve.server.responses_input import Item, shortened
from vlserve.server.responses_request import ResponsesRequest
from vlserve.server.responses_store import BackgroundRun, ResponseStore, kept_items
from vlserve.server.streams import EventResponse

if TYPE_CHECKING:
    from vlserve.pipeline.vl_pipeline import VLPipeline

Items = Sequence[tuple[Item, str]]
Make = Callable[[Sequence[Prompt]], ResponsesAnswer]
Run = Callable[[Any, Any, ExitStack], Response]
MAX_LISTED = 100


class Responses:
    """The routes' functions below /v1/responses, and the plan of a request to it."""

    def __init__(self, pipeline: VLPipeline, config: ServerConfig, keys: Keys, model: str) -> None:
        self._pipeline, self._keys, self._model = pipeline, keys, model
        self._store = ResponseStore(config)

    def plan(
        self, request: Request, asked: ResponsesRequest, defaults: Mapping[str, Any]
    ) -> tuple[
        Coroutine[Any, Any, Prompt], list[SamplingParams], Callable[[Sequence[Prompt]], ResponsesAnswer], Run | None, ForPrompt
    ]:
        """The prompt being prepared, its parameters, what makes the answer, and what runs it in the background."""
        asked.check()
        owner = self._owner(request)
        items = self._store.conversation(asked, owner)
        if asked.truncation != "auto":
            self._pipeline.check_number(len(items) // 2, "items", "input")  # thoughts may take no token of their own
        chat = asked.to_chat(items)
        has_dial = any(map(self._pipeline.uses_variable, chat.prompt_options().wishes))
        params = chat.params(defaults)
        kept = kept_items(items) if self._store.keeps(asked) else None

        async def prepare(some: Items) -> Prompt:
            chat = asked.to_chat(some)
            prompt = await self._pipeline.prepare(read_messages(chat.messages, local=False), chat.prompt_options())
            self._pipeline.check(prompt, params[0])
            return prompt

        def make(prompts: Sequence[Prompt]) -> ResponsesAnswer:
            keep = None if kept is None else lambda body: self._store.put(owner, kept, body)
            effort = asked.effort if has_dial else None
            tokenizer, must = self._pipeline.tokenizer, chat.must_call
            return ResponsesAnswer(asked, chat.calls, effort, params[0], prompts[0], tokenizer, self._model, keep, must)

        def run(answer: ResponsesAnswer, deltas: Any, held: ExitStack) -> Response:
            begun = BackgroundRun(answer, deltas, held, keeps_events=bool(asked.stream))
            self._store.begin(owner, kept or (), begun)
            return EventResponse(begun.listen(-1), ExitStack()) if asked.stream else JSONResponse(answer.whole())

        tries = shortened(items) if asked.truncation == "auto" else [lambda: items]
        return _longest(tries, prepare), params, make, run if asked.background else None, chat.for_prompt

    async def retrieve(self, request: Request, response_id: str) -> Response:
        """A kept response as it is now; with stream=true the events of one that was asked for so in the background."""
        kept = self._store.find(response_id, self._owner(request))
        query = request.query_params
        if query.get("stream", "false").lower() != "true":
            return JSONResponse(kept.whole())
        if kept.run is None or kept.run.events is None:
            raise RequestError("only a response made with background and stream: true can be streamed again", param="stream")
        return EventResponse(kept.run.listen(_integer(query, "starting_after", -1, 0)), ExitStack())

    async def input_items(self, request: Request, response_id: str) -> dict[str, Any]:
        """The items that a kept response answered, the newest first unless order=asc."""
        query = request.query_params
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise RequestError("order must be asc or desc", param="order")
        limit = _integer(query, "limit", 20, 1)
        if limit > MAX_LISTED:
            raise RequestError(f"limit is {limit}; expected 1 to {MAX_LISTED}", param="limit")
        items = list(self._store.find(response_id, self._owner(request)).items)
        items = items if order == "asc" else items[::-1]
        if "after" in query:
            ids = [item["id"] for item in items]
            if query["after"] not in ids:
                raise RequestError("after names no item of this response", param="after")
            items = items[ids.index(query["after"]) + 1 :]
        data = items[:limit]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(items) > limit}

    async def delete(self, request: Request, response_id: str) -> dict[str, Any]:
        """Forget a kept response; one that is being made ends first."""
        await self._store.delete(response_id, self._owner(request))
        return {"id": response_id, "object": "response", "deleted": True}

    async def cancel(self, request: Request, response_id: str) -> Response:
        """End a response that is made in the background."""
        return JSONResponse(await self._store.cancel(response_id, self._owner(request)))

    def _owner(self, request: Request) -> str:
        return self._keys.owner(request.headers.get("authorization"))


async def _longest(tries: Sequence[Callable[[], Items]], prepare: Callable[[Items], Awaitable[Prompt]]) -> Prompt:
    """The prompt of the first of `tries` (the longest first) that the context holds."""

    async def fits(items: Items) -> Prompt | None:
        try:
            return await prepare(items)
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            return None

    if len(tries) > 1:
        whole = await fits(tries[0]())
        if whole is not None:
            return whole
    low, high = min(1, len(tries) - 1), len(tries) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await fits(tries[middle]()) is not None else (middle + 1, high)
    return await prepare(tries[low]())


def _integer(query: Mapping[str, str], name: str, default: int, least: int) -> int:
    given = query.get(name)
    if given is None:
        return default
    if not given.isascii() or not given.isdecimal() or len(given) > 9 or int(given) < least:
        raise RequestError(f"{name} must be a whole number of {least} or more", param=name)
    return int(given)
