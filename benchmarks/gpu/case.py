"""One operation in one shape: what it costs at least, how it is launched, and how it is built, checked and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.cards import Card
from benchmarks.gpu.predict import Kernel, Prediction, predict
from benchmarks.gpu.sizes import Work
from vlserve.kernels.measure import Difference, difference

Run = Callable[[], Any]
# rounding to bfloat16 once is 1.7e-3 and 0
TOLERANCE = Difference(4e-3, 0.03)
ON_CPU = 2**20  # bytes of inputs up to which a dry run makes real tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """Something else that does the same. `want`: its own definition, where its numbers are not ours."""

    name: str
    run: Run
    want: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """`run` gives what is compared with `want`, in float64; `rivals` makes them one after another, and may raise."""

    run: Run
    want: Callable[[], torch.Tensor]
    rivals: Callable[[], Iterator[Callable[[], Rival]]] = field(default=lambda: iter(()))
    observe: Callable[[Any], torch.Tensor] = field(default=lambda result: result)  # what of a result is compared

    def difference(self, rival: Rival | None = None) -> Difference:
        """Of what `run`, or a rival, gives now."""
        if rival is None:
            return difference(self.observe(self.run()), self.want())
        return difference(self.observe(rival.run()), (rival.want or self.want)())


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`plan` says how it is launched on (architecture as 90, multiprocessors); `build` makes its inputs on a device.

    `kernels`: what is launched on a card, one after the other, by our implementation.
    """

    model: str
    kernel: str
    shape: str
    work: Work
    plan: Callable[[int, int], str]
    kernels: Callable[[Card], list[Kernel]]
    build: Callable[[torch.device], Built]
    tolerance: Difference = TOLERANCE

    @property
    def name(self) -> str:
        return f"{self.model} {self.kernel}, {self.shape}"

    def predict(self, card: Card) -> Prediction:
        return predict(self.kernels(card), card)

    @property
    def dry_device(self) -> torch.device:
        return torch.device("cpu" if self.work.bytes <= ON_CPU else "meta")
