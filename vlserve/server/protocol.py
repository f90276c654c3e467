"""What all routes share: reading a body strictly, the sampling fields, usage, log-probabilities, errors.

A field that would change the answer and is not supported is refused by name; one that cannot change it
is accepted. Nothing is accepted and then ignored.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import vlserve
from vlserve.config import MAX_LOGPROBS, SamplingParams
from vlserve.engine.messages import TokenLogprob
from vlserve.errors import RequestError
from vlserve.migrating import explain_sampling
from vlserve.pipeline.outputs import Usage
from vlserve.prompt.build import Prompt
from vlserve.prompt.tokenizer import Tokenizer

MAX_CHOICES = 16  # of one request
FINGERPRINT = f"vlserve-{vlserve.__version__}"  # what serves
# without any influence on the answer
HARMLESS = frozenset(
    (
        *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("prompt_cache_options", "prediction", "request_id", "priority"),
    )
)
# values that ask for nothing, of fields that are not supported otherwise: clients send them unasked
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "background": (False,),
    "truncation": ("disabled",),
    "include": ([],),
    "spaces_between_special_tokens": (True,),
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Strict(BaseModel):
    """null means not given; numbers are not read out of texts."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # random padding that OpenAI adds; none is added here


class Body(Strict):
    """A request's body; unknown fields were looked at before, by `read_body`."""

    model_config = ConfigDict(extra="ignore", strict=True)
    model: str | None = Field(None, description="the id that /v1/models lists; may be left out")

    def renamed(self, error: RequestError) -> RequestError:
        """The error with this request's names for the fields."""
        return error


class AnswerBody(Body):
    """A request for answers."""

    stream: bool | None = Field(None, description="server-sent events instead of one object")

    def failure_event(self, error: Mapping[str, Any]) -> bytes:
        """The event of an error object, of a failure before there was any part of an answer."""
        return event(error)


class SamplingBody(AnswerBody):
    """How answers are drawn: OpenAI's names, and vLLM's for what OpenAI lacks."""

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
    max_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    n: int | None = Field(None, description=f"answers to give, 1 to {MAX_CHOICES}")
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, description="caches are shared only with requests of the same salt")
    return_token_ids: bool | None = Field(None, description="also give prompt_token_ids and each choice's token_ids")

    @property
    def num_choices(self) -> int:
        return self.n or 1

    def options(self) -> StreamOptions:
        return self.stream_options or StreamOptions()

    def sampling(self, defaults: Mapping[str, Any], **own: Any) -> list[SamplingParams]:
        """Parameters of each choice; raises RequestError naming the field. `defaults` are the checkpoint's."""
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise RequestError(f"n is {self.n}; expected 1 to {MAX_CHOICES}", param="n")
        if self.cache_salt is not None and not 0 < len(self.cache_salt) <= 256:
            raise RequestError("cache_salt must have 1 to 256 characters", param="cache_salt")
        fields = {name: getattr(self, name) for name in SamplingParams.__dataclass_fields__ if name in type(self).model_fields}
        fields |= {"logit_bias": _read_bias(self.logit_bias)} | own
        params = SamplingParams(**{**defaults, **{key: value for key, value in fields.items() if value is not None}})
        if self.num_choices == 1:
            return [params]
        given = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
        seeds = [None if params.seed is None else _following(params.seed, i) for i in range(self.num_choices)]
        return [SamplingParams(**given | {"seed": seed}) for seed in seeds]


B = TypeVar("B", bound=Body)
A = TypeVar("A", bound=AnswerBody)


def read_body(body: bytes, kind: type[B], *, required: Sequence[str]) -> B:
    """Parse a request's body; raises RequestError naming the field."""
    try:
        values = json.loads(body)
        if _SURROGATE.search(body):  # half of a character, e.g. an emoji that was cut: no text that could be encoded
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise RequestError("the request's body is not valid JSON in UTF-8") from None
    if not isinstance(values, dict):
        raise RequestError("the request's body must be a JSON object")
    for name in required:
        if values.get(name) is None:
            raise RequestError(f"{name} is missing", param=name)
    values = {key: value for key, value in values.items() if value is not None and key not in HARMLESS}
    for key in sorted(set(values) - set(kind.model_fields)):
        if values.pop(key) not in NEUTRAL.get(key, ()):
            what = "only supported as " + json.dumps(NEUTRAL[key][0]) if key in NEUTRAL else "not a field that is supported"
            what += explain_sampling(_shown(key), kind.model_fields)
            raise RequestError(f"{_shown(key)} is {what}", param=_shown(key), code="unsupported_parameter")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = _place(first["loc"])
        raise RequestError(f"{place}: {first['msg']}", param=place) from None


def _shown(key: str) -> str:
    return key if len(key) <= 64 else key[:64] + "..."


def _place(location: Sequence[int | str]) -> str:
    """stop.0 and the like; a union's arms (`list[str]`, `ToolChoice`) are no fields."""
    fields = [p for p in location if isinstance(p, int) or (p.islower() and "[" not in p and p not in ("str", "bool", "int"))]
    return ".".join(map(str, fields)) or "body"


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json asks for; greedy where it does not sample."""
    wanted = {"repetition_penalty": 1.0}
    if generation.get("do_sample"):
        wanted |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return {key: generation.get(key) or value for key, value in wanted.items()}


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def envelope(id: str, kind: str, model: str, created: int) -> dict[str, Any]:
    body = {"id": id, "object": kind, "created": created, "model": model}
    return body | {"system_fingerprint": FINGERPRINT, "service_tier": "default"}


def model_permission(created: int) -> dict[str, Any]:
    """The one entry of a model's `permission`, as vLLM has it; OpenAI had it once, and old clients read it."""
    allowed = ("sampling", "logprobs", "view")
    forbidden = ("create_engine", "search_indices", "fine_tuning")
    body = {"id": new_id("modelperm"), "object": "model_permission", "created": created}
    body |= {f"allow_{name}": True for name in allowed} | {f"allow_{name}": False for name in forbidden}
    return body | {"organization": "*", "group": None, "is_blocking": False}


def now() -> int:
    return int(time.time())


def first_usage(prompt: Prompt) -> Usage:
    """Before the first token."""
    return Usage(prompt_tokens=len(prompt.token_ids), completion_tokens=0, image_tokens=prompt.num_image_tokens, cached_tokens=0)


def chunk_usage(options: StreamOptions, usage: Usage, reasoning_tokens: int = 0) -> dict[str, Any]:
    """What a chunk says of usage: nothing unless asked for, and null before the end unless asked for all along."""
    if not options.include_usage:
        return {}
    return {"usage": usage_dict([usage], reasoning_tokens) if options.continuous_usage_stats else None}


def usage_dict(usages: Sequence[Usage], reasoning_tokens: int = 0) -> dict[str, Any]:
    """Of all choices together: the prompt counts once."""
    first = usages[0]
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": first.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": first.cached_tokens,
            "image_tokens": first.image_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def logprobs_dict(entries: Sequence[TokenLogprob] | None, tokenizer: Tokenizer, *, as_ids: bool = False) -> dict[str, Any] | None:
    """Log-probabilities as OpenAI writes them, None when none were asked for."""
    if entries is None:
        return None

    def one(id: int, logprob: float) -> dict[str, Any]:
        shown = token_logprob(id, logprob, tokenizer)
        return shown | {"token": f"token_id:{id}"} if as_ids else shown

    content = [one(e.token_id, e.logprob) | {"top_logprobs": [one(*top) for top in e.top]} for e in entries]
    return {"content": content, "refusal": None}


def token_logprob(id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.decode([id], skip_special_tokens=False)
    # JSON has no -Infinity; OpenAI uses -9999 for what cannot be
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def check_top_logprobs(number: int | None, name: str = "top_logprobs") -> None:
    if number is not None and not 0 <= number <= MAX_LOGPROBS:
        raise RequestError(f"{name} is {number}; expected 0 to {MAX_LOGPROBS}", param=name)


def error_dict(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Chunks:
    """How the two completion APIs stream: events without names, errors as objects of their own, [DONE]."""

    ends_with_done = True

    def event(self, body: dict[str, Any]) -> bytes:
        return event(body)

    def failure(self, message: str, code: str) -> dict[str, Any]:
        return error_dict(message, kind="server_error", code=code)


DONE = b"data: [DONE]\n\n"


def _following(seed: int, i: int) -> int:
    """The i-th after a seed; after the last of 64 bits comes the first."""
    return (seed + i + 2**63) % 2**64 - 2**63


def _read_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    try:
        return None if given is None else {int(key): value for key, value in given.items()}
    except ValueError:
        raise RequestError("logit_bias: expected token ids as keys", param="logit_bias") from None
