"""What all routes share: reading a body strictly, the sampling fields, usage, log-probabilities, errors.

A field that would change the answer and is not supported is refused by name; one that cannot change it
is accepted (neutral.py). Nothing is accepted and then ignored.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

import vlserve
from vlserve.config import MAX_LOGPROBS, SamplingParams
from vlserve.engine.messages import TokenLogprob
from vlserve.errors import RequestError
from vlserve.pipeline.outputs import Usage
from vlserve.prompt.build import Prompt
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.server import neutral
from vlserve.server.validation import explain

MAX_CHOICES = 16  # of one request
FINGERPRINT = f"vlserve-{vlserve.__version__}"  # what serves
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Strict(BaseModel):
    """null means not given; numbers are not read out of texts."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # random padding that OpenAI adds; none is added here


def _check_metadata(given: dict[str, str]) -> dict[str, str]:
    if len(given) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in given.items()):
        raise ValueError("expected at most 16 keys of at most 64 characters, with values of at most 512")
    return given


class Body(Strict):
    """A request's body; unknown fields were looked at before, by `read_body`.

    All but the first are checked and have no influence on the answer.
    """

    model_config = ConfigDict(extra="ignore", strict=True)
    instead: ClassVar[Mapping[str, str]] = {}  # fields of other routes and APIs, with what to send in their place
    model: str | None = Field(None, description="the id that /v1/models lists; may be left out")
    user: str | None = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], AfterValidator(_check_metadata)] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    request_id: str | None = None
    rid: str | list[str] | None = Field(None, description="SGLang's name of request_id")
    priority: int | None = None
    session_id: int | str | None = None
    spaces_between_special_tokens: bool | None = Field(None, description="no tokenizer here writes such spaces")

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
    min_new_tokens: int | None = Field(None, description="LMDeploy's name of min_tokens")
    max_tokens: int | None = None
    max_completion_tokens: int | None = Field(None, description="OpenAI's newer name of max_tokens; counts where both are given")
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

    def renamed(self, error: RequestError) -> RequestError:
        """The error of a sampling parameter with the name that was sent."""
        other = OTHER_NAMES.get(error.param or "")
        return error if other is None or getattr(self, other) is None else rename(error, other)

    def sampling(self, defaults: Mapping[str, Any], **own: Any) -> list[SamplingParams]:
        """Parameters of each choice; raises RequestError naming the field. `defaults` are the checkpoint's."""
        if self.n is not None and not 1 <= self.n <= MAX_CHOICES:
            raise RequestError(f"n is {self.n}; expected 1 to {MAX_CHOICES}", param="n")
        if self.cache_salt is not None and not 0 < len(self.cache_salt) <= 256:
            raise RequestError("cache_salt must have 1 to 256 characters, or be left out", param="cache_salt")
        options = self.options()
        if options.continuous_usage_stats and not self.stream:
            message = "stream_options.continuous_usage_stats needs stream: true; a whole answer always has its usage"
            raise RequestError(message, param="stream_options")
        fields = {name: getattr(self, name) for name in SamplingParams.__dataclass_fields__ if name in type(self).model_fields}
        fields |= {name: getattr(self, other) for name, other in OTHER_NAMES.items() if getattr(self, other) is not None}
        fields |= {"logit_bias": _read_bias(self.logit_bias)} | own
        params = SamplingParams(**{**defaults, **{key: value for key, value in fields.items() if value is not None}})
        if self.num_choices == 1:
            return [params]
        given = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
        seeds = [None if params.seed is None else _following(params.seed, i) for i in range(self.num_choices)]
        return [SamplingParams(**given | {"seed": seed}) for seed in seeds]


# other names of sampling fields; they count where both are given
OTHER_NAMES = {"max_tokens": "max_completion_tokens", "min_tokens": "min_new_tokens"}
B = TypeVar("B", bound=Body)
A = TypeVar("A", bound=AnswerBody)


def read_body(body: bytes, kind: type[B], *, required: Sequence[str]) -> B:
    """Parse a request's body; raises RequestError naming the field."""
    if not body.strip():
        raise RequestError("the request's body is empty; expected a JSON object")
    try:
        values = json.loads(body)
        if _SURROGATE.search(body):  # half of a character, e.g. an emoji that was cut: no text that could be encoded
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise RequestError("the request's body is not valid JSON in UTF-8") from None
    if not isinstance(values, dict):
        raise RequestError("the request's body must be a JSON object")
    more = values.get("kwargs")  # where LMDeploy's client puts what it does not know
    if isinstance(more, dict):
        values = more | {key: value for key, value in values.items() if key != "kwargs"}
    values = {key: value for key, value in values.items() if not neutral.is_empty(key, value)}
    for key in sorted(set(values) - set(kind.model_fields)):
        if not neutral.is_neutral(key, values.pop(key)):
            raise neutral.refusal(key, kind.model_fields, kind.instead)
    for name in required:
        if values.get(name) is None:
            raise RequestError(f"{name} is missing", param=name)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise explain(error) from None


def rename(error: RequestError, new: str) -> RequestError:
    """An error of a field with the name that the client knows it by."""
    return RequestError(str(error).replace(error.param or "", new), param=new, code=error.code)


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json asks for; greedy where it does not sample."""
    wanted = {"repetition_penalty": 1.0}
    if generation.get("do_sample"):
        wanted |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return {key: generation.get(key) or value for key, value in wanted.items()}


def new_id(prefix: str) -> str:
    """An id that begins as OpenAI's do, e.g. with call_ or chatcmpl-."""
    return prefix + uuid.uuid4().hex


def envelope(id: str, kind: str, model: str, created: int) -> dict[str, Any]:
    body = {"id": id, "object": kind, "created": created, "model": model}
    return body | {"system_fingerprint": FINGERPRINT, "service_tier": "default"}


def model_permission(created: int) -> dict[str, Any]:
    """The one entry of a model's `permission`, as vLLM has it; OpenAI had it once, and old clients read it."""
    allowed = ("sampling", "logprobs", "view")
    forbidden = ("create_engine", "search_indices", "fine_tuning")
    body = {"id": new_id("modelperm-"), "object": "model_permission", "created": created}
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
        return token_logprob(id, logprob, tokenizer, as_ids=as_ids)

    content = [one(e.token_id, e.logprob) | {"top_logprobs": [one(*top) for top in e.top]} for e in entries]
    return {"content": content, "refusal": None}


def token_logprob(id: int, logprob: float, tokenizer: Tokenizer, *, as_ids: bool = False) -> dict[str, Any]:
    own = tokenizer.bytes_of(id)
    text = f"token_id:{id}" if as_ids else own.decode(errors="replace")
    # JSON has no -Infinity; OpenAI uses -9999 for what cannot be
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(own)}


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
    """The i-th after a seed; after the last of 64 bits comes the first, and -1, which means none, is left out."""
    following = (seed + i + 2**63) % 2**64 - 2**63
    return following + (seed < -1 <= following)


def _read_bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    try:
        return None if given is None else {int(key): value for key, value in given.items()}
    except ValueError:
        raise RequestError("logit_bias: expected token ids as keys", param="logit_bias") from None
