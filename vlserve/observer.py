"""Who watches a pipeline, and the clocks that tell them: one for a prompt's preparation, one for its answer.

Knows no metric and no log; those are observers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vlserve.engine.messages import FinishReason, TokenEvent
from vlserve.outputs import Timing, Usage

if TYPE_CHECKING:
    from vlserve.prompt import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """Seconds that a prompt's preparation took; one entry a picture, `fetch_s` only for those behind http(s) URLs."""

    fetch_s: tuple[float, ...] = ()
    decode_s: tuple[float, ...] = ()
    tiling_s: tuple[float, ...] = ()
    total_s: float = 0.0


class Observer(Protocol):
    """Called in whichever event loop answers, so it must be thread-safe and quick, and must not raise."""

    def prepared(self, preparation: Preparation) -> None:
        """A prompt is ready. It may be answered never, once or several times."""

    def first_token(self, prompt: Prompt, ttft_s: float) -> None:
        """An answer's first token, counted from the start of the preparation."""

    def next_token(self, gap_s: float) -> None:
        """Each later token, counted from the one before."""

    def ended(self, reason: FinishReason, usage: Usage, timing: Timing | None) -> None:
        """An answer's end, once; `timing` only where the model came to an end (stop, length)."""


@dataclass(slots=True)
class PreparationClock:
    """Collects the seconds of one preparation, from any thread."""

    fetch_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    tiling_s: list[float] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    @contextmanager
    def measure(self, seconds: list[float]) -> Iterator[None]:
        """Adds what the block took to one of the lists; nothing when it raises."""
        begun = time.monotonic()
        yield
        seconds.append(time.monotonic() - begun)

    def read(self) -> Preparation:
        return Preparation(
            fetch_s=tuple(self.fetch_s),
            decode_s=tuple(self.decode_s),
            tiling_s=tuple(self.tiling_s),
            total_s=time.monotonic() - self.begun,
        )


class AnswerClock:
    """Follows one answer and tells the observers. `end` counts once; later calls are nothing."""

    def __init__(self, prompt: Prompt, observers: Sequence[Observer]) -> None:
        self._prompt, self._observers = prompt, observers
        self._begun = time.monotonic() - prompt.preparation.total_s
        self._first: float | None = None
        self._last = self._begun
        self._num_tokens = self._cached_tokens = 0
        self._ended = False

    def saw(self, event: TokenEvent) -> None:
        if event.token_id is None:
            return
        now = time.monotonic()
        self._num_tokens += 1
        self._cached_tokens = event.cached_tokens
        if self._first is None:
            self._first = now
            for observer in self._observers:
                observer.first_token(self._prompt, now - self._begun)
        else:
            for observer in self._observers:
                observer.next_token(now - self._last)
        self._last = now

    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=len(self._prompt.token_ids),
            completion_tokens=self._num_tokens,
            image_tokens=self._prompt.num_image_tokens,
            cached_tokens=self._cached_tokens,
        )

    def timing(self, event: TokenEvent) -> Timing:
        """Up to `event`, the last one."""
        first = self._last if self._first is None else self._first
        return Timing(
            prepare_s=self._prompt.preparation.total_s,
            queue_s=event.queue_s,
            encode_s=event.encode_s,
            ttft_s=first - self._begun,
            total_s=self._last - self._begun,
        )

    def end(self, reason: FinishReason, timing: Timing | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        for observer in self._observers:
            observer.ended(reason, self.usage(), timing)
