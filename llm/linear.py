"""Linear layers of the decoder, and where their weights stand in a checkpoint.

Projections that read the same input are one matrix here (query, key and value; gate and up), while a
checkpoint stores them one by one: `targets` says which rows belong to which name.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn


class FusedLinear(nn.Module):
    """y = x W^T + b with the outputs of several named projections one after another."""

    def __init__(self, in_features: int, outputs: dict[str, int], *, bias: bool) -> None:
        super().__init__()
        self.outputs = outputs
        out_features = sum(outputs.values())
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, sum of outputs]."""
        return F.linear(x, self.weight, self.bias)

    def targets(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(checkpoint name, rows) for each part, e.g. `{prefix}q_proj.weight`."""
        start = 0
        for name, size in self.outputs.items():
            yield f"{prefix}{name}.weight", self.weight.data[start : start + size]
            if self.bias is not None:
                yield f"{prefix}{name}.bias", self.bias.data[start : start + size]
            start += size
