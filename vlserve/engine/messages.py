"""What front and rank say to each other, as msgpack; pixels travel beside it as plain bytes.

Types only: who sends what when is the client's and the rank's business.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from vlserve.config import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class ImageRef(msgspec.Struct, frozen=True):
    """A picture of a request; its tiles [num_tiles, 3, S, S] uint8 are a frame of their own, in order."""

    start: int
    num_tokens: int
    digest: bytes
    num_tiles: int


class Add(msgspec.Struct, frozen=True, tag=True):
    id: int
    token_ids: list[int]
    images: list[ImageRef]
    sampling: SamplingParams
    max_tokens: int
    cache_salt: str = ""


class Abort(msgspec.Struct, frozen=True, tag=True):
    ids: list[int]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


class Stage(msgspec.Struct, frozen=True, tag=True):
    """Where start-up is, e.g. "weights", with `done` of `total` parts."""

    name: str
    done: int = 0
    total: int = 0


class Ready(msgspec.Struct, frozen=True, tag=True):
    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    device: str
    dtype: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Start-up ended; `kind` names the error's class."""

    kind: str
    message: str


class TokenLogprob(msgspec.Struct, frozen=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # likeliest first


class TokenEvent(msgspec.Struct, frozen=True):
    """One new token of a request, or its end without one; `finish_reason` is set on the last event only."""

    id: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None
    is_overdue: bool = False  # the error is that the request's time was up
    cached_tokens: int = 0
    queue_s: float = 0.0
    encode_s: float = 0.0


class Stats(msgspec.Struct, frozen=True):
    """The engine's gauges now, and its counters since it started."""

    num_running: int
    num_waiting: int
    num_used_blocks: int  # owned by requests; what is only kept as a cached prefix counts as free
    num_blocks: int
    prefix_queries: int  # prompt tokens of admitted requests
    prefix_hits: int  # of these, found in the prefix cache
    image_queries: int  # pictures whose features a request needed
    image_hits: int  # of these, found in the feature cache
    num_preemptions: int
    encode_s: float  # seconds that the vision encoder ran
    device_bytes: list[dict[str, int]]  # of each rank, by kind


class Step(msgspec.Struct, frozen=True, tag=True):
    """Sent after every step, also without events: it is the engine's sign of life."""

    events: list[TokenEvent]
    stats: Stats


ToRank = Add | Abort | Shutdown
FromRank = Stage | Ready | Failed | Step
