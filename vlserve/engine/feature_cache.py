"""Image features by digest, kept across requests within a number of bytes, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch


class FeatureCache:
    """`in_use` names the digests that a running request still needs; those are never dropped."""

    def __init__(self, max_bytes: int, in_use: Callable[[], set[bytes]]) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._in_use = in_use
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def get(self, digest: bytes) -> torch.Tensor | None:
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: torch.Tensor) -> None:
        """Keep `features` [F, levels, hidden]; call `trim` once the step that needed them is over."""
        self._features[digest] = features
        self.num_bytes += features.nbytes

    def trim(self) -> list[bytes]:
        """Drop the least recently used features that nobody needs until the rest fits; returns whose."""
        dropped = []
        in_use = self._in_use() if self.num_bytes > self.max_bytes else set()
        for digest in [d for d in self._features if d not in in_use]:
            if self.num_bytes <= self.max_bytes:
                break
            dropped.append(digest)
            self.drop([digest])
        return dropped

    def drop(self, digests: list[bytes]) -> None:
        for digest in digests:
            self.num_bytes -= self._features.pop(digest).nbytes
