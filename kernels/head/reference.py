"""The language model's head, which multiplies with the vocabulary's rows: in 16 bits, or in 8 bits with a scale a row.

Shapes: T rows of hidden states, K hidden size, N rows of the vocabulary. weight [N, K]; or codes [N, K] int8, whole numbers from
-127 to 127, and scales [N] float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 2**19  # weights that are spread out at once, so that they stay in the processor's cache


def head_matmul_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] times weight^T -> [T, N], computed in float64 and rounded once to x's type."""
    return F.linear(x.double(), weight.double()).to(x.dtype)


def quantise_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> codes and scales, a block of rows at a time.

    The scales have no more digits than bfloat16, in which torch's operator wants them: the codes are made for what is used.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    step = max(1, BLOCK // max(1, weight.shape[1]))
    for rows, kept, scale in zip(weight.split(step), codes.split(step), scales.split(step), strict=True):
        largest = rows.abs().amax(dim=1).float()
        scale.copy_((largest / 127).to(torch.bfloat16))
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)  # a row of zeros, such as padding
        kept.copy_((rows.float() / divisor[:, None]).round().clamp(-127, 127))
    return codes, scales


def int8_matmul_ref(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [T, K] times (codes * scales)^T -> [T, N], computed in float64 and rounded once to x's type."""
    return F.linear(x.double(), codes.double() * scales.double()[:, None]).to(x.dtype)
