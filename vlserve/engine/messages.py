"""What front and ranks say to each other, as msgpack; pixels lie in files of shared memory, as plain bytes.

Types only: who sends what when is the client's and the rank's business.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from vlserve.config import SamplingParams
from vlserve.vision.pixels import Unit

FinishReason = Literal["stop", "length", "abort", "error"]
Task = Literal["serve", "preflight"]  # what ranks are started for; a preflight ends before the weights
STAGES = ("starting", "imports", "rendezvous", "all-reduce", "weights", "kv cache", "warm-up", "ready")  # of a rank, in order


def pixel_file(digest: bytes) -> str:
    """The name of the file with a picture's units."""
    return digest.hex()


class MediaRef(msgspec.Struct, frozen=True):
    """A picture of a request; its units' numbers, one after another, are in the file that `pixel_file` names.

    `runs`: (first token, number) of the tokens that its features take the place of, in order. `start`: its layout's first token,
    from which on positions may depend on the picture.
    """

    digest: bytes
    units: list[Unit]
    runs: list[tuple[int, int]]
    start: int


class PromptPositions(msgspec.Struct, frozen=True):
    """Where a prompt's tokens stand, where they do not just follow one another: int32 [axes, T] as bytes of this machine's order.
    The answer's tokens stand at `next` and on, on every axis."""

    num_axes: int
    numbers: bytes
    next: int


class Add(msgspec.Struct, frozen=True, tag=True):
    id: int
    token_ids: list[int]
    media: list[MediaRef]
    sampling: SamplingParams
    max_tokens: int
    cache_salt: str = ""
    positions: PromptPositions | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    ids: list[int]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


class Stage(msgspec.Struct, frozen=True, tag=True):
    """Where a rank's start-up is, e.g. "weights", with `done` of `total` parts."""

    name: str
    done: int = 0
    total: int = 0
    rank: int = 0


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A rank serves."""

    rank: int
    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    device: str
    dtype: str
    device_bytes: dict[str, int]  # by kind


class AllReduceTime(msgspec.Struct, frozen=True):
    """Of one size: seconds, the median of several on this rank."""

    num_bytes: int
    seconds: float


class Preflight(msgspec.Struct, frozen=True, tag=True):
    """A rank could compute on its device, met the others, and added up with them."""

    rank: int
    device: str
    all_reduce: list[AllReduceTime]  # none with one rank


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A rank gave up; `kind` names the error's class. `is_echo`: only because another rank did not take part."""

    kind: str
    message: str
    rank: int = 0
    is_echo: bool = False


class Memory(msgspec.Struct, frozen=True, tag=True):
    """What a rank other than 0 holds, by kind, when that changed."""

    rank: int
    device_bytes: dict[str, int]


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


STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


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
    step_s: float  # seconds in steps, the encoder's included
    comm_s: float  # of these, seconds in collectives with the other ranks
    device_bytes: list[dict[str, int]]  # of each rank of this machine, by kind
    step_sizes: list[int] = []  # steps by the tokens they computed: up to each of STEP_TOKENS, and above
    step_tokens: int = 0  # of all steps


class Step(msgspec.Struct, frozen=True, tag=True):
    """Sent after every step, also without events: it is the engine's sign of life."""

    events: list[TokenEvent]
    stats: Stats
    num_taken: int  # messages that rank 0 had read before this step, since it started


ToRank = Add | Abort | Shutdown
FromRank = Stage | Ready | Preflight | Failed | Step | Memory
