"""One request inside the engine: its tokens, its pictures' places, how far it is. Knows nothing of tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, Protocol

from vlserve.config import SamplingParams
from vlserve.llm.block_pool import Digest, block_digest
from vlserve.vision.pixels import Unit

UNKNOWN = -1  # stands for a token until the step that samples it has been read


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MediaSpan:
    """One picture in the sequence. `runs`: (first token, number) of the tokens that its features take the place of, in order.
    `layout_start`: the first of all tokens that stand for it."""

    digest: bytes
    units: Seq[Unit]
    runs: Seq[tuple[int, int]]
    layout_start: int
    pixels: Any  # [bytes] uint8, opaque here

    @property
    def start(self) -> int:
        return self.runs[0][0]

    @property
    def stop(self) -> int:
        return sum(self.runs[-1])

    @property
    def num_features(self) -> int:
        return sum(number for _, number in self.runs)

    def overlaps(self, start: int, stop: int) -> bool:
        return self.start < stop and start < self.stop

    def within(self, start: int, stop: int) -> tuple[int, list[tuple[int, int]]]:
        """Of the tokens start..stop: (the first feature that goes there, the parts of the runs)."""
        first, parts = 0, []
        for begin, number in self.runs:
            low, high = max(begin, start), min(begin + number, stop)
            if low < high:
                parts.append((low, high - low))
            first += max(0, min(start - begin, number))
        return first, parts


class TokenPositions:
    """Where the tokens stand where they do not just follow one another; from the answer on they do, on every axis.

    Args:
        axes: a number for each token of the prompt, by axis. next: where the answer's first token stands.
    """

    def __init__(self, axes: Seq[Seq[int]], next: int) -> None:
        self._axes, self._num_known = axes, len(axes[0])
        self.offset = next - self._num_known  # of an answer's token's position to its place in the sequence

    def between(self, start: int, stop: int) -> list[int]:
        """Of tokens start..stop, one axis after another; [] where all of them are the answer's."""
        if start >= self._num_known:
            return []
        answered = [place + self.offset for place in range(self._num_known, stop)]
        return [position for axis in self._axes for position in [*axis[start:stop], *answered]]


class Grammar(Protocol):
    """What the answer must follow, as far as the scheduler is concerned; the matcher stays with its sequence."""

    @property
    def is_ready(self) -> bool:
        """It has been compiled."""

    @property
    def error(self) -> str | None:
        """Why it never will be."""

    is_finished: bool  # nothing may follow any more

    def accept(self, token_id: int) -> bool:
        """Go on by a token; False when it does not fit."""

    def cancel(self) -> None:
        """It is not needed any more."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutable; owned by the scheduler. `num_computed <= len(token_ids)` always; the last token may be `UNKNOWN`."""

    id: int
    token_ids: list[int]  # prompt and answer
    media: list[MediaSpan]
    sampling: SamplingParams
    max_tokens: int
    positions: TokenPositions | None = None
    cache_salt: bytes = b""  # blocks are shared only within one salt
    grammar: Grammar | None = None
    num_prompt_tokens: int = 0
    num_computed: int = 0  # tokens whose keys and values are in the cache
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when first scheduled
    blocks: list[int] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None  # first scheduled
    encode_s: float = 0.0
    has_ended: bool = False

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def is_ready(self) -> bool:
        """It can be admitted."""
        return not self.is_unknown and (self.grammar is None or self.grammar.is_ready)

    @property
    def is_unknown(self) -> bool:
        """Its last token has been asked for and not been read."""
        return self.token_ids[-1] == UNKNOWN

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def _decides(self, media: MediaSpan, start: int, stop: int) -> bool:
        """Whether a picture decides what a block of tokens start..stop holds: by its features, or by where its tokens stand."""
        first = media.start if self.positions is None else media.layout_start
        return first < stop and start < media.stop

    def digest_blocks(self, number: int, block_size: int) -> list[Digest]:
        """Digests of the first `number` full blocks, computed once each."""
        while len(self.digests) < number:
            start = len(self.digests) * block_size
            stop = start + block_size
            assert stop <= len(self.token_ids), f"block {len(self.digests)} is not full"
            extra = [
                media.digest + (media.start - start).to_bytes(8, "little", signed=True)
                for media in self.media
                if self._decides(media, start, stop)
            ]
            previous = self.digests[-1] if self.digests else self.cache_salt
            self.digests.append(block_digest(previous, self.token_ids[start:stop], extra))
        return self.digests[:number]
