"""What a user gets back: a whole answer or its pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlserve.engine.messages import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request; `image_tokens` and `cached_tokens` are parts of `prompt_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds: preparing pictures and prompt, waiting for the engine, encoding the pictures; from the start of the
    preparation to the first token, and to the last."""

    prepare_s: float
    queue_s: float
    encode_s: float
    ttft_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The next piece of an answer; `usage` is so far. The last one has a `finish_reason`, and then `timing` too."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    usage: Usage | None = None
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """The next bit of an answer, told apart. `call` counts function calls from 0; the first piece of each has its `name`."""

    kind: Literal["reasoning", "content", "call"]
    text: str
    call: int = 0
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer. `text` is without what ended it (but see `include_stop_str_in_output`), `token_ids` with it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    logprobs: tuple[TokenLogprob, ...] | None = None
