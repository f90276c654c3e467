"""Keys and values in eight bits, with a scale for each token and KV head.

A number is `code * scale`, where the scale is the largest magnitude of the head's D numbers over the largest code: 127 for
int8, 448 for FP8 E4M3. It is rounded to bfloat16 before the codes are made, so that the codes make up for it: two bytes with
float32's range, which neither outliers nor tiny values leave. A token that is all zeros has scale 0. NaN and infinity make the
scale so, and with it the token. Shapes: N blocks of S slots, HK KV heads, D head_dim, n blocks picked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}  # by the type of the codes; uint8 holds the bits of E4M3
CODE_TYPES = {"int8": torch.int8, "fp8": torch.uint8}
SCALE_TYPE = torch.bfloat16
TINY = 2.0**-120  # scales below are 0, so that no product is subnormal


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedBlocks:
    """Keys or values of one layer; stands where a tensor [N, S, HK, D] of the computation type stands otherwise."""

    codes: torch.Tensor  # [N, S, HK, D] int8, or uint8 with the bits of E4M3
    scales: torch.Tensor  # [N, S, HK] bfloat16

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


Blocks = torch.Tensor | QuantizedBlocks
