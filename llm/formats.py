"""How a linear layer's logical slice is stored and multiplied. Which slice a rank owns is decided in linear.py.

A checkpoint's tensor fills a `Slot`: a part of a parameter, from a span of the tensor along one or more dimensions. What has
another format in memory fills a `ReadSlot`. Quantised formats are in formats_int4.py and formats_8bit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.llm.parallel import Span


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """`tensor` holds, of a checkpoint's tensor of shape `full`, the span of each dimension that `spans` names."""

    tensor: torch.Tensor
    full: tuple[int, ...]
    spans: dict[int, Span]


@dataclass(frozen=True, slots=True, eq=False)
class ReadSlot(Slot):
    """`read` takes what it needs of a checkpoint's tensor of shape `full`, given a handle on it, and returns the bytes read."""

    read: Callable[[Any], int]


class Format(Protocol):
    """What a linear layer asks of the way its weights are stored.

    `in_span` is the part of the `in_features` inputs, `outputs` of each projection's outputs, that this rank has.
    """

    in_span: Span
    in_features: int
    outputs: dict[str, tuple[Span, int]]

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out]; `sums`: what `empty_sums` gave, filled."""
        ...

    def empty_sums(self, x: torch.Tensor) -> torch.Tensor | None:
        """Room for what the product takes beside inputs for x's tokens, for the operation that makes them to fill.

        See kernels/group_sums/; None where it takes nothing, or where the inputs are rearranged first.
        """
        ...

    def targets(self, prefix: str) -> Iterator[tuple[str, Slot]]:
        """What each of a checkpoint's tensors fills."""
        ...

    def finish(self) -> None:
        """Called once, when all weights are there and before the first use: the time to put them into another order."""
        ...


class DenseFormat(nn.Module):
    """Weights as they are: [outputs of this rank, inputs of this rank]."""

    def __init__(self, in_span: Span, in_features: int, outputs: dict[str, tuple[Span, int]]) -> None:
        super().__init__()
        self.in_span, self.in_features, self.outputs = in_span, in_features, outputs
        self.weight = nn.Parameter(torch.empty(sum(span.size for span, _ in outputs.values()), in_span.size), requires_grad=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        return F.linear(x, self.weight, bias)

    def empty_sums(self, x: torch.Tensor) -> None:
        """Dense products take nothing else."""

    def targets(self, prefix: str) -> Iterator[tuple[str, Slot]]:
        start = 0
        for name, (span, size) in self.outputs.items():
            rows = self.weight.data[start : start + span.size]
            yield f"{prefix}{name}.weight", Slot(rows, (size, self.in_features), {0: span, 1: self.in_span})
            start += span.size

    def finish(self) -> None:
        """Dense weights are used as they are."""
