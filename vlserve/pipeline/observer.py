"""Who watches a pipeline, and the clock that tells them of an answer.

Knows no metric and no log; those are observers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from vlserve.engine.messages import FinishReason, TokenEvent
from vlserve.pipeline.outputs import Timing, Usage
from vlserve.timing import Preparation

if TYPE_CHECKING:
    from vlserve.prompt.build import Prompt


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
