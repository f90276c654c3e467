"""Between HTTP as clients and proxies speak it and the routes: odd paths, HEAD, answers that come before the body was read."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

Message = MutableMapping[str, Any]
CLOSE = (b"connection", b"close")
KEPT_BYTES = 2**20  # a body that is known to be no larger is read to its end, and the connection stays
DRAINED_BYTES, DRAIN_S = 2**28, 30.0  # of a body that nobody wants


def plain_path(path: str) -> str:
    """Without the doubled and trailing slashes that clients make out of a base URL and a path."""
    return re.sub("/{2,}", "/", path).rstrip("/") or "/"


class HttpEdge:
    """Middleware of the whole app, before any route and so before any key is asked for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = "GET" if scope["method"] == "HEAD" else scope["method"]  # the server below leaves the body out
        scope = {**scope, "path": plain_path(scope["path"]), "method": method}
        await answer_in_full(self._app, scope, receive, send)


async def answer_in_full(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the app; an answer that it gives before it has read the body is seen by clients that send all of the body first.

    What is left of the body is read and dropped before the answer ends, up to DRAINED_BYTES. A connection that is closed with
    bytes unread would be reset, and the answer lost with it.
    """
    headers = dict(scope["headers"])
    length = int(headers.get(b"content-length", b"0")) if headers.get(b"content-length", b"0").isdigit() else 0
    is_left = length > 0 or b"transfer-encoding" in headers
    waits = headers.get(b"expect", b"").lower() == b"100-continue"  # with the body, for a word that it does not get

    async def watched_receive() -> Message:
        nonlocal is_left, waits
        waits = False  # asking for the body sends the word
        message = await receive()
        is_left = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def drain() -> None:
        left = DRAINED_BYTES
        while is_left and left > 0:
            left -= len((await watched_receive()).get("body", b""))

    async def watched_send(message: Message) -> None:
        if message["type"] == "http.response.start" and is_left and (waits or not 0 < length <= KEPT_BYTES):
            message["headers"] = [*(header for header in message.get("headers", ()) if header != CLOSE), CLOSE]
        if message["type"] == "http.response.body" and not message.get("more_body", False) and is_left and not waits:
            await send({**message, "more_body": True})
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(drain(), DRAIN_S)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    await app(scope, watched_receive, watched_send)
