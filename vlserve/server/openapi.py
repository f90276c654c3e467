"""What the served OpenAPI document says of each route: the body's schema, the answers, the errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

import vlserve
from vlserve.server.neutral import NEUTRAL

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/{model}"
TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}


def _object(**properties: Schema) -> Schema:
    """All properties given are required; an answer may have more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT)))
STATUS = _object(status=TEXT)
NUMBERS: Schema = {"type": "object", "additionalProperties": INTEGER}
MODEL = _object(
    id=TEXT,
    object={"const": "model"},
    created=INTEGER,
    owned_by=TEXT,
    root=TEXT,
    parent={"type": "null"},
    max_model_len=_or_null(INTEGER),
    permission=_list({"type": "object"}),
)
USAGE = _object(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=NUMBERS,
    completion_tokens_details=NUMBERS,
)
MESSAGE = _object(role={"const": "assistant"}, content=_or_null(TEXT))
ANSWERS: dict[str, Schema] = {
    "/live": STATUS,
    "/health": STATUS,
    "/version": _object(version=TEXT),
    "/v1/models": _object(object={"const": "list"}, data=_list(MODEL)),
    "/v1/models/{model}": MODEL,
    "/v1/chat/completions": _object(
        id=TEXT,
        object={"const": "chat.completion"},
        created=INTEGER,
        model=TEXT,
        choices=_list(_object(index=INTEGER, message=MESSAGE, finish_reason=TEXT)),
        usage=USAGE,
    ),
    "/v1/completions": _object(
        id=TEXT,
        object={"const": "text_completion"},
        created=INTEGER,
        model=TEXT,
        choices=_list(_object(index=INTEGER, text=TEXT, finish_reason=TEXT)),
        usage=USAGE,
    ),
    "/v1/responses": _object(id=TEXT, object={"const": "response"}, status=TEXT, model=TEXT, output=_list({"type": "object"})),
    "/v1/responses/{response_id}": _object(id=TEXT, object={"const": "response"}),
    "/v1/responses/{response_id}/input_items": _object(object={"const": "list"}, data=_list({"type": "object"})),
    "/v1/responses/{response_id}/cancel": _object(id=TEXT, object={"const": "response"}, status=TEXT),
    "/tokenize": _object(count=INTEGER, max_model_len=_or_null(INTEGER), tokens=_list(INTEGER), token_strs=_or_null(_list(TEXT))),
    "/detokenize": _object(prompt=TEXT),
}
KEPT = "/v1/responses/{response_id}"
STREAMS = (KEPT, "/v1/chat/completions", "/v1/completions", "/v1/responses")
OPEN = ("/live", "/health")
ERRORS = {
    400: "the request is wrong; the error names the field",
    401: "an API key is needed",
    404: "another model's name, or no such response",
    413: "the body is too large",
    415: "the body's Content-Encoding is not one that is taken",
    429: "too many requests are open; try again after Retry-After seconds",
    500: "an error of the server",
    503: "loading, shutting down, or failed; try again after Retry-After seconds",
    504: "the request's time was up",
}


def read_route(path: str) -> dict[str, Any]:
    """Keywords of `add_api_route` for a GET route."""
    wrong = (400,) if path.startswith(KEPT) else ()
    status = (503,) if path == "/health" else () if path in OPEN else (*wrong, 401, 404) if "{" in path else (401,)
    form = JSONResponse if path in ANSWERS else PlainTextResponse
    return {"responses": _responses(path, status), "response_model": None, "response_class": form}


def body_route(path: str, body: type[BaseModel]) -> dict[str, Any]:
    """Keywords of `add_api_route` for a POST route."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=body.__name__)}}}
    extra = {"requestBody": {"required": True, "content": content}}
    return {"responses": _responses(path, tuple(ERRORS)), "response_model": None, "openapi_extra": extra}


def document(routes: APIRouter, bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The OpenAPI document of these routes, whose POST routes take `bodies`."""
    made = get_openapi(title="vlserve", version=vlserve.__version__, routes=routes.routes)
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    for path in made["paths"].values():
        for operation in path.values():
            operation.get("responses", {}).pop("422", None)  # FastAPI's own, never sent
    for body in bodies:
        schema = body.model_json_schema(ref_template=REFERENCE)
        schemas.update(schema.pop("$defs", {}))
        schemas[body.__name__] = schema | _others(body)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return made


def _others(body: type[BaseModel]) -> Schema:
    """What is done with fields beside a body's own: some may have one value, what is empty may have any name, and all others are
    refused by name."""
    own = body.model_json_schema(ref_template=REFERENCE)["properties"]
    empty: list[Any] = [None, "", [], {}]
    bound: Schema = {
        name: {"enum": [*values, *empty], "description": "not supported; accepted only with a value that asks for nothing"}
        for name, values in NEUTRAL.items()
    }
    return {
        "description": "Any other field is refused: status 400, code unsupported_parameter, and param names it.",
        "properties": bound | own,
        "additionalProperties": {"enum": empty},
    }


def _responses(path: str, errors: tuple[int, ...]) -> dict[int | str, dict[str, Any]]:
    content: dict[str, Any] = {"application/json": {"schema": ANSWERS[path]}} if path in ANSWERS else {"text/plain": {}}
    if path in STREAMS:
        content["text/event-stream"] = {"schema": {"description": "server-sent events, whose data is JSON"}}
    wrong = STATUS if path == "/health" else ERROR
    found: dict[int | str, dict[str, Any]] = {200: {"description": "the answer", "content": content}}
    for status in errors:
        found[status] = {"description": ERRORS[status], "content": {"application/json": {"schema": wrong}}}
    return found
