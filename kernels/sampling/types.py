"""What is asked for when a token is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What is asked for a row; a top_k of 0 and a top_p of 1 leave all in. `number`: of the draws that the seed made before."""

    row: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int
    number: int

    def cuts(self, vocab: int) -> bool:
        """Whether top-k or top-p leaves out any of so many."""
        return 0 < self.top_k < vocab or self.top_p < 1

    @property
    def reach(self) -> float:
        """How far below the largest logit min-p keeps them."""
        return -self.temperature * math.log(self.min_p) if self.min_p > 0 else math.inf
