"""Linear layers of the decoder, split over ranks: which slice a rank owns, and where it stands in a checkpoint.

Projections that read the same input are one matrix here (query, key and value; gate and up), while a
checkpoint stores them one by one. How a slice is stored is in formats.py; a layer is built dense, and detect_formats.py gives it
another format where the checkpoint has one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vlserve.llm.formats import DenseFormat, Format, Slot
from vlserve.llm.parallel import Group, Span


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b: whole inputs, this rank's span of each named projection's outputs, one after another.

    Args:
        outputs: (this rank's span, the checkpoint's size) of each projection.
    """

    def __init__(self, in_features: int, outputs: dict[str, tuple[Span, int]], *, bias: bool) -> None:
        super().__init__()
        self.outputs = outputs
        self.format: Format = DenseFormat(Span(0, in_features, in_features), in_features, outputs)
        self.others: dict[str, Slot] = {}  # further tensors that a checkpoint has for this layer, by name
        size = sum(span.size for span, _ in outputs.values())
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, sum of this rank's outputs]; `sums`: as the format's `empty_sums`, filled."""
        return self.format(x, self.bias, sums)

    def targets(self, prefix: str) -> Iterator[tuple[str, Slot]]:
        """(checkpoint name, what it fills) for each part, e.g. `{prefix}q_proj.weight`."""
        yield from self.format.targets(prefix)
        if self.bias is not None:
            for (name, (span, size)), part in zip(
                self.outputs.items(), self.bias.data.split([span.size for span, _ in self.outputs.values()]), strict=True
            ):
                yield f"{prefix}{name}.bias", Slot(part, (size,), {0: span})
        yield from ((prefix + name, slot) for name, slot in self.others.items())


class RowParallelLinear(nn.Module):
    """y = sum over ranks of x W^T, + b: this rank's span of the inputs, whole outputs, the same on every rank."""

    def __init__(self, name: str, in_span: Span, in_features: int, out_features: int, *, bias: bool, group: Group) -> None:
        super().__init__()
        self.name, self._group = name, group
        self.format: Format = DenseFormat(in_span, in_features, {name: (Span(0, out_features, out_features), out_features)})
        self.others: dict[str, Slot] = {}
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, this rank's inputs] -> [T, out]; `sums`: as the format's `empty_sums`, filled."""
        y = self._group.all_reduce(self.format(x, sums=sums), self.name)
        return y if self.bias is None else y + self.bias  # added once, after the sum

    def targets(self, prefix: str) -> Iterator[tuple[str, Slot]]:
        yield from self.format.targets(prefix)
        if self.bias is not None:
            size = len(self.bias)
            yield f"{prefix}{self.name}.bias", Slot(self.bias.data, (size,), {})
        yield from ((prefix + name, slot) for name, slot in self.others.items())


Linear = ColumnParallelLinear | RowParallelLinear
