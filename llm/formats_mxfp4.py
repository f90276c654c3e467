"""A linear layer's weights in MXFP4: 4-bit floating-point codes (E2M1), of which 32 inputs share a power of two (E8M0).

They are kept as they are stored; codes and scales of zero are zeros, so padding is.

Source: OCP Microscaling Formats (MX) Specification v1.0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.kernels.experts.reference import dequantize_ref
from vlserve.kernels.experts.types import MXFP4_GROUP, Mxfp4Experts
from vlserve.llm.formats import Slot
from vlserve.llm.tensor_parallel import Span

BLOCKS, SCALES = "mxfp4_blocks", "mxfp4_scales"  # behind a projection's name, as stored_names.py gives them


class Mxfp4Format(nn.Module):
    """codes [outputs, inputs / 32, 16] uint8, the even input in the lower half; scales [outputs, inputs / 32] uint8."""

    def __init__(self, in_span: Span, in_features: int, outputs: dict[str, tuple[Span, int]]) -> None:
        super().__init__()
        self.in_span, self.in_features, self.outputs = in_span, in_features, outputs
        if any(place % MXFP4_GROUP for place in (in_features, in_span.start, in_span.size)):
            raise ValueError(
                f"{', '.join(outputs)}: MXFP4 has groups of {MXFP4_GROUP} inputs, and these are {in_span} of {in_features}"
            )
        size, groups = sum(span.size for span, _ in outputs.values()), in_span.size // MXFP4_GROUP
        self.codes = nn.Parameter(torch.empty(size, groups, MXFP4_GROUP // 2, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(size, groups, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        return F.linear(x, self.dequantise().to(x.dtype), bias)

    def dequantise(self) -> torch.Tensor:
        """[outputs, inputs] float32, exactly."""
        return dequantize_ref(Mxfp4Experts(codes=self.codes[None], scales=self.scales[None]))[0].float()

    def empty_sums(self, x: torch.Tensor) -> None:
        """These products take nothing else."""

    def targets(self, prefix: str) -> Iterator[tuple[str, Slot]]:
        edges = (self.in_span.start, self.in_span.stop, self.in_span.size)
        groups = Span(*(edge // MXFP4_GROUP for edge in edges))
        shape, start = (self.in_features // MXFP4_GROUP, MXFP4_GROUP // 2), 0
        for name, (span, size) in self.outputs.items():
            rows = slice(start, start + span.size)
            yield f"{prefix}{name}.{BLOCKS}", Slot(self.codes.data[rows], (size, *shape), {0: span, 1: groups})
            yield f"{prefix}{name}.{SCALES}", Slot(self.scales.data[rows], (size, shape[0]), {0: span, 1: groups})
            start += span.size

    def finish(self) -> None:
        """They are used as they are."""
