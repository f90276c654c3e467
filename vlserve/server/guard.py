"""The route that every request passes: it asks for a key, and turns our errors into OpenAI's error objects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vlserve.errors import DeadlineError, EngineError, OverloadedError, RequestError
from vlserve.server import protocol
from vlserve.server.admission import Keys
from vlserve.server.content import known_encodings
from vlserve.system_limits import refused

log = logging.getLogger(__name__)
INTERNAL_ERROR = "internal error; the server's log says more"
# by an error's code; else 400
STATUSES = {"model_not_found": 404, "response_not_found": 404, "body_too_large": 413, "unsupported_content_encoding": 415}
OPEN_ROUTES = ("health", "live")  # names of the routes that ask for no key


def route_class(keys: Keys) -> type[APIRoute]:
    """A route that asks for a key, and turns our errors into OpenAI's error objects."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            is_open = self.name in OPEN_ROUTES  # the route itself, however the request's path is spelt

            async def handler(request: Request) -> Response:
                if is_open or keys.allow(request.headers.get("authorization")):
                    return await _guarded(handle, request)
                message = "a valid API key is needed: Authorization: Bearer KEY"
                body = protocol.error_dict(message, kind="authentication_error", code="invalid_api_key")
                return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})

            return handler

    return Route


async def _guarded(handle: Callable[[Request], Coroutine[Any, Any, Response]], request: Request) -> Response:
    """The response, or our errors as OpenAI's error objects."""
    try:
        return await handle(request)
    except (HTTPException, RequestValidationError):  # the including app's own
        raise
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    except asyncio.CancelledError:
        if asyncio.current_task() is not None and await request.is_disconnected():
            return Response(status_code=499)
        raise
    except Exception as error:  # noqa: BLE001  (told to the client, and the log)
        what = f"{request.method} {getattr(request.scope.get('route'), 'path', '?')}"  # not the client's text
        status, body, headers = told(error, what)
        return JSONResponse(body, status, headers)


def told(error: Exception, what: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, error object and headers of whatever `what` raised; the log hears of what is no client's doing."""
    if isinstance(error, RequestError):
        status = STATUSES.get(error.code, 400)
        body = protocol.error_dict(str(error), kind="invalid_request_error", param=error.param, code=error.code)
        return status, body, {"Accept-Encoding": ", ".join(known_encodings())} if status == 415 else {}
    if isinstance(error, OverloadedError):
        return 429, protocol.error_dict(str(error), kind="rate_limit_error", code="overloaded"), {"Retry-After": "1"}
    known = error if isinstance(error, EngineError) else refused(error, what)
    if known is None:
        log.exception("%s failed", what)
        return 500, protocol.error_dict(INTERNAL_ERROR, kind="server_error"), {}
    body = protocol.error_dict(str(known), kind="server_error", code=engine_error_code(known))
    return (504, body, {}) if isinstance(known, DeadlineError) else (503, body, {"Retry-After": "5"})


def engine_error_code(error: EngineError) -> str:
    return "deadline_exceeded" if isinstance(error, DeadlineError) else "engine_error"
