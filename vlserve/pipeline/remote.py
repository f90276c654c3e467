"""`VLPipeline("http://host:port")`: the same calls and results, answered by a vlserve server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import ssl
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

from vlserve.config import MediaConfig, SamplingParams
from vlserve.engine.messages import TokenLogprob
from vlserve.errors import ConfigError, DeadlineError, EngineError, OverloadedError, RequestError, VLServeError
from vlserve.media.decode import decode_image
from vlserve.media.sources import read_source, scheme_of
from vlserve.pipeline.calls import PipelineCalls
from vlserve.pipeline.outputs import Delta, Timing, Usage
from vlserve.prompt.chat_messages import ImagePart, Turn

CONNECT_S, SILENCE_S = 10.0, 600.0  # to connect; between two pieces of an answer
NOT_HERE = "this pipeline asks a server; only a local one can do that"


class RemotePipeline(PipelineCalls):
    """A pipeline whose model runs elsewhere.

    Args:
        model: the server's address, http(s)://host:port, also with /v1.
        api_key: one of the server's keys. model_name: the id it serves; default: the only one it lists.
        max_at_once: prompts of a list sent at a time.
        wait: False returns before the server is ready.

    Pictures are sent as they are: files and bytes unchanged, PIL images and arrays as PNG; the server fetches URLs.
    """

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        model_name: str | None = None,
        max_at_once: int = 64,
        wait: bool = True,
        **options: Any,
    ) -> None:
        if options:
            name = sorted(options)[0]
            raise ConfigError(f"{name} is the server's option; over the network: api_key, model_name, max_at_once, wait")
        super().__init__()
        self.url = model.rstrip("/").removesuffix("/v1")
        self.max_at_once = max_at_once
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._model_name = model_name
        self._is_closed = False
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Block until the server's model is loaded, showing the stages on a terminal; raises EngineError when it is not there."""
        import httpx2

        shown = sys.stderr.isatty()
        while True:
            try:
                answer = httpx2.get(f"{self.url}/health", timeout=CONNECT_S, verify=_ssl_context())
                health = answer.json()
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
                raise EngineError(f"no vlserve server answers at {self.url} ({type(error).__name__})") from None
            if answer.status_code == 200:
                break
            if not isinstance(health, Mapping) or health.get("status") != "loading":
                reason = health.get("message", answer.status_code) if isinstance(health, Mapping) else answer.status_code
                raise EngineError(f"the server at {self.url} is not ready: {reason}")
            if shown:
                print(f"\r\033[K{self.url}: loading: {health.get('stage')}", end="", file=sys.stderr, flush=True)
            time.sleep(0.2)
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    async def answers(self, turns: Sequence[Turn], params: SamplingParams) -> AsyncIterator[Delta]:
        import httpx2

        if self._is_closed:
            raise EngineError("the pipeline was closed")
        messages, names = await asyncio.get_running_loop().run_in_executor(None, _messages, turns)
        body = {"messages": messages, "stream": True, **_options(params)}
        if self._model_name is not None:
            body["model"] = self._model_name
        timeout = httpx2.Timeout(SILENCE_S, connect=CONNECT_S)
        try:
            async with (
                httpx2.AsyncClient(timeout=timeout, headers=self._headers, verify=_ssl_context()) as client,
                client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response,
            ):
                if response.status_code != 200:
                    await response.aread()
                    _raise(response.status_code, _error(response.content), names)
                async for delta in _deltas(response.aiter_lines(), names):
                    yield delta
        except httpx2.HTTPError as error:
            raise EngineError(f"the server at {self.url} cannot be reached ({type(error).__name__})") from None

    def close(self) -> None:
        """End open requests; the server goes on."""
        self._is_closed = True
        self._end_loop()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: {NOT_HERE}")

    async def prepare(self, *arguments: Any, **options: Any) -> NoReturn:
        raise EngineError(NOT_HERE)

    prepare_text = prepare


@cache
def _ssl_context() -> ssl.SSLContext:
    """Reading the certificates takes tens of milliseconds: once, not for every question."""
    import httpx2

    return httpx2.create_ssl_context()


def _options(params: SamplingParams) -> dict[str, Any]:
    """All parameters, since the server's defaults may differ, and what is needed to rebuild the answer."""
    body: dict[str, Any] = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    body["logit_bias"] = {str(id): value for id, value in params.logit_bias.items()}
    body["logprobs"], body["top_logprobs"] = params.logprobs is not None, params.logprobs
    form = body.pop("structured")
    if form is not None:
        value = getattr(form, form.kind)
        body["structured_outputs"] = {form.kind: value}
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": True, "return_timing": True, "separate_reasoning": False}
    return body | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


def _messages(turns: Sequence[Turn]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The API's messages, and our name of each of its fields that holds a picture."""
    names: dict[str, str] = {}
    messages = []
    for i, turn in enumerate(turns):
        content: Any = "".join(map(str, turn.parts)) if turn.is_string else []
        for j, part in enumerate(() if turn.is_string else turn.parts):
            if isinstance(part, ImagePart):
                names[f"messages[{i}].content[{j}].image_url"] = part.param
                url = {"url": _image_url(part)} | ({} if part.detail == "auto" else {"detail": part.detail})
                content.append({"type": "image_url", "image_url": url})
            else:
                content.append({"type": "text", "text": part})
        messages.append({"role": turn.role, "content": content, **_fields(turn.fields)})
    return messages, names


def _fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Function calls with their arguments as text again."""

    def text(arguments: Any) -> str:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    calls = [
        call | {"function": call["function"] | {"arguments": text(call["function"]["arguments"])}}
        for call in fields.get("tool_calls", ())
    ]
    return {**fields, **({"tool_calls": calls} if calls else {})}


def _image_url(part: ImagePart) -> str:
    if scheme_of(part.source) in ("http", "https", "data"):
        url: str = part.source
        return url
    config = MediaConfig()
    source = read_source(part, config)
    if not isinstance(source, bytes):
        buffer = io.BytesIO()
        decode_image(source, param=part.param, config=config).save(buffer, "PNG", compress_level=1)
        source = buffer.getvalue()
    return "data:image/*;base64," + base64.b64encode(source).decode()


async def _deltas(lines: AsyncIterator[str], names: Mapping[str, str]) -> AsyncIterator[Delta]:
    """Pieces from the lines of a stream of server-sent events."""
    async for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            status = 504 if event["error"].get("code") == "deadline_exceeded" else 503
            _raise(status, event["error"], names)
        if not event["choices"]:
            continue
        (choice,) = event["choices"]
        if choice["delta"].get("role") and event.get("usage") is None:  # the opening
            continue
        entries = [_logprob(entry) for entry in (choice["logprobs"] or {}).get("content", ())]
        yield Delta(
            text=choice["delta"].get("content") or "",
            token_ids=tuple(choice.get("token_ids") or ()),
            finish_reason=choice["finish_reason"],
            logprobs=tuple(entries) or None,
            usage=_usage(event["usage"]) if event.get("usage") else None,
            timing=Timing(**choice["timing"]) if "timing" in choice else None,
        )
        if choice["finish_reason"] is not None:
            return
    raise EngineError("the server's answer broke off")


def _usage(usage: Mapping[str, Any]) -> Usage:
    details = usage["prompt_tokens_details"]
    return Usage(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        image_tokens=details["image_tokens"],
        cached_tokens=details["cached_tokens"],
    )


def _logprob(entry: Mapping[str, Any]) -> TokenLogprob:
    def id_of(entry: Mapping[str, Any]) -> int:
        return int(entry["token"].removeprefix("token_id:"))

    top = [(id_of(other), other["logprob"]) for other in entry["top_logprobs"]]
    return TokenLogprob(token_id=id_of(entry), logprob=entry["logprob"], top=top)


def _error(body: bytes) -> Mapping[str, Any]:
    try:
        error = json.loads(body)["error"]
        return error if isinstance(error, Mapping) else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _raise(status: int, error: Mapping[str, Any], names: Mapping[str, str]) -> NoReturn:
    """The server's error as the one that a local pipeline raises, with our names of its fields."""
    message, param = str(error.get("message") or f"the server answered {status}"), error.get("param")
    for theirs, ours in names.items():
        if param == theirs:
            message, param = message.replace(theirs, ours), ours
    if status == 401:
        raise ConfigError(f"api_key: {message}")
    kinds: dict[int, type[VLServeError]] = {429: OverloadedError, 504: DeadlineError}
    if status in kinds or status >= 500:
        raise kinds.get(status, EngineError)(message)
    if isinstance(param, str) and param.startswith("structured_outputs"):
        ours = "structured" + param[len("structured_outputs") :]
        message, param = message.replace(param, ours), ours
    raise RequestError(message, param=param, code=str(error.get("code") or "invalid_request"))
