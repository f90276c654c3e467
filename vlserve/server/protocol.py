"""The shapes of the HTTP API: what a request may say, and what is answered.

A field that would change the answer and is not supported is refused by name; one that cannot change it
is accepted. Nothing is accepted and then ignored.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlserve.config import MAX_LOGPROBS, SamplingParams
from vlserve.engine.messages import TokenLogprob
from vlserve.errors import RequestError
from vlserve.outputs import Usage
from vlserve.tokenizer import Tokenizer

# without any influence on the answer
HARMLESS = frozenset(
    ("user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
)
# neutral values of fields that are not supported otherwise: clients send them unasked
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "echo": (False,),
}


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """POST /v1/chat/completions: OpenAI's names, and vLLM's for what OpenAI lacks. null means not given."""

    model_config = ConfigDict(extra="allow", strict=True)
    messages: list[Any]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Raises RequestError naming the field. `defaults` are the checkpoint's."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise RequestError(f"top_logprobs is {self.top_logprobs}; expected 0 to {MAX_LOGPROBS}", param="top_logprobs")
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            raise RequestError(
                f"max_completion_tokens is {self.max_completion_tokens}; expected 1 or more", param="max_completion_tokens"
            )
        given = {name: getattr(self, name) for name in SamplingParams.__dataclass_fields__ if name in type(self).model_fields}
        given["max_tokens"] = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        given["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        given["logit_bias"] = _read_bias(self.logit_bias)
        return SamplingParams(**{**defaults, **{key: value for key, value in given.items() if value is not None}})


def read_chat_request(body: bytes) -> ChatRequest:
    """Parse a request's body; raises RequestError naming the field."""
    try:
        values = json.loads(body)
        if _SURROGATE.search(body):  # half of a character, e.g. an emoji that was cut: no text that could be encoded
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise RequestError("the request's body is not valid JSON in UTF-8") from None
    if not isinstance(values, dict):
        raise RequestError("the request's body must be a JSON object")
    if "messages" not in values or values["messages"] is None:
        raise RequestError("messages is missing", param="messages")
    values = {key: value for key, value in values.items() if value is not None and key not in HARMLESS}
    for key in sorted(set(values) - set(ChatRequest.model_fields)):
        if values.pop(key) not in NEUTRAL.get(key, ()):
            what = "only supported as " + json.dumps(NEUTRAL[key][0]) if key in NEUTRAL else "not a field that is supported"
            raise RequestError(f"{key} is {what}", param=key, code="unsupported_parameter")
    try:
        return ChatRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = [p for p in first["loc"] if p not in ("str", "list[str]")]  # arms of a union, not fields
        param = ".".join(map(str, place)) or "body"
        raise RequestError(f"{param}: {first['msg']}", param=param) from None


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json asks for; greedy where it does not sample."""
    wanted = {"repetition_penalty": 1.0}
    if generation.get("do_sample"):
        wanted |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return {key: generation.get(key) or value for key, value in wanted.items()}


def new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def completion(id: str, model: str, message: Mapping[str, Any], reason: str, logprobs: Any, usage: Usage) -> dict[str, Any]:
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}
    return _envelope(id, "chat.completion", model) | {"choices": [choice], "usage": usage_dict(usage)}


def chunk(id: str, model: str, delta: Mapping[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return _envelope(id, "chat.completion.chunk", model) | {"choices": [choice]}


def usage_chunk(id: str, model: str, usage: Usage) -> dict[str, Any]:
    return _envelope(id, "chat.completion.chunk", model) | {"choices": [], "usage": usage_dict(usage)}


def usage_dict(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
    }


def logprobs_dict(entries: Sequence[TokenLogprob] | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """OpenAI's form of log-probabilities, None when none were asked for."""
    if entries is None:
        return None

    def one(id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([id], skip_special_tokens=False)
        # JSON has no -Infinity; OpenAI uses -9999 for what cannot be
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    content = [one(e.token_id, e.logprob) | {"top_logprobs": [one(*top) for top in e.top]} for e in entries]
    return {"content": content, "refusal": None}


def error_dict(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _envelope(id: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def _read_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    try:
        return None if given is None else {int(key): value for key, value in given.items()}
    except ValueError:
        raise RequestError("logit_bias: expected token ids as keys", param="logit_bias") from None
