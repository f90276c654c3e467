"""4-bit weights in pairs, as kernels take them. How they lie there, and the letters: reference.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlserve.kernels.group_sums.reference import INPUTS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedCodes:
    """A layer's weights as they lie there; padding has scale 0, or inputs of 0."""

    words: torch.Tensor  # [N'/64, K'/128, 64, 16] int32
    scales: torch.Tensor  # [N'/64, G', 64] float16 or bfloat16, by SCALE_ORDER
    zeros: torch.Tensor  # [N'/64, G', 64] uint8, by ZERO_ORDER
    inputs: int
    outputs: int

    @property
    def padded_inputs(self) -> int:
        return self.words.shape[1] * INPUTS

    @property
    def group(self) -> int:
        """Inputs, of K', that share a scale."""
        return self.padded_inputs // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + self.zeros.nbytes
