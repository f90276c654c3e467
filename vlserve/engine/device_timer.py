"""How long work took on its device, known once the device is through with it. Nothing is waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

Then = Callable[[float], None]


class Timings:
    """`begin` and `end` around a piece of work; its seconds are told when `settle` finds it done, on the CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, Then]] = deque()

    def begin(self) -> torch.cuda.Event | float:
        return self._event() if self._is_cuda else time.monotonic()

    def end(self, begun: torch.cuda.Event | float, then: Then) -> None:
        if isinstance(begun, torch.cuda.Event):
            self._pending.append((begun, self._event(), then))
        else:
            then(time.monotonic() - begun)

    def settle(self) -> None:
        while self._pending and self._pending[0][1].query():
            begun, ended, then = self._pending.popleft()
            then(begun.elapsed_time(ended) / 1000)

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
