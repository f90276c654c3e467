"""How long the preparation of a prompt took: what media and prompt measure and observers are told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """Seconds that a prompt's preparation took; one entry a picture, `fetch_s` only for those behind http(s) URLs."""

    fetch_s: tuple[float, ...] = ()
    decode_s: tuple[float, ...] = ()
    tiling_s: tuple[float, ...] = ()
    total_s: float = 0.0


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
