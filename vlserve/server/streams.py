"""From the engine's deltas to what goes over the wire, while the client stays: several answers merged, events, failures."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from vlserve.errors import EngineError
from vlserve.pipeline.outputs import Delta
from vlserve.server import protocol
from vlserve.server.guard import INTERNAL_ERROR, engine_error_code
from vlserve.system_limits import refused

log = logging.getLogger(__name__)
QUIET_S = 15.0  # proxies wait for 60 s or longer, some clients for 30
COMMENT = b": keep-alive\n\n"
T = TypeVar("T")


class Answer(Protocol):
    """What turns the engine's deltas into one API's objects."""

    ends_with_done: bool

    def opening(self) -> Iterator[dict[str, Any]]: ...
    def add(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]: ...
    def closing(self) -> Iterator[dict[str, Any]]: ...
    def failure(self, message: str, code: str) -> dict[str, Any]: ...
    def event(self, body: dict[str, Any]) -> bytes: ...
    def whole(self) -> dict[str, Any]: ...


class EventResponse(StreamingResponse):
    """Server-sent events; `held` is closed at the end, however it ends.

    A comment line goes out after each QUIET_S without an event: proxies and clients end connections on which nothing moves.
    """

    def __init__(self, events: AsyncIterator[bytes], held: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        last = time.monotonic()

        async def watched_send(message: Message) -> None:
            nonlocal last
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                reminder.cancel()
            last = time.monotonic()
            await send(message)

        async def remind() -> None:
            while True:
                quiet = time.monotonic() - last
                if quiet < QUIET_S:
                    await asyncio.sleep(QUIET_S - quiet)
                else:
                    await watched_send({"type": "http.response.body", "body": COMMENT, "more_body": True})

        with self._held:
            reminder = asyncio.ensure_future(remind())
            try:
                await super().__call__(scope, receive, watched_send)
            finally:
                reminder.cancel()


async def late_events(
    preparing: asyncio.Task[T], begin: Callable[[T], AsyncIterator[bytes]], failed: Callable[[Exception], bytes]
) -> AsyncIterator[bytes]:
    """The events of an answer that was not prepared within QUIET_S, when the stream began without it."""
    try:
        stream = begin(await preparing)
    except Exception as error:  # noqa: BLE001  (told to the client, and the log)
        yield failed(error)
        return
    try:
        async for event in stream:
            yield event
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


async def events(answer: Answer, deltas: AsyncIterator[tuple[int, Delta]]) -> AsyncIterator[bytes]:
    """The events of one answer, an error event on failure."""
    try:
        for body in answer.opening():
            yield answer.event(body)
        async for index, delta in deltas:
            for body in answer.add(index, delta):
                yield answer.event(body)
        for body in answer.closing():
            yield answer.event(body)
    except EngineError as error:
        yield answer.event(answer.failure(str(error), engine_error_code(error)))
        return
    except Exception as error:
        known = refused(error, "a stream")
        if known is not None:
            yield answer.event(answer.failure(str(known), engine_error_code(known)))
            return
        log.exception("a stream failed")
        yield answer.event(answer.failure(INTERNAL_ERROR, "internal_error"))
        return
    finally:
        await deltas.aclose()  # type: ignore[attr-defined]
    if answer.ends_with_done:
        yield protocol.DONE


async def merge(streams: Sequence[AsyncIterator[Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    """Deltas of several answers as they come, with the answer's number; the first failure ends all."""
    if len(streams) == 1:
        try:
            async for delta in streams[0]:
                yield 0, delta
        finally:
            await streams[0].aclose()  # type: ignore[attr-defined]
        return
    queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Delta]) -> None:
        try:
            async for delta in stream:
                queue.put_nowait((index, delta))
            queue.put_nowait((index, None))
        except Exception as error:  # noqa: BLE001  (handed on)
            queue.put_nowait((index, error))
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
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
