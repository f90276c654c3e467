"""Linear layers with 4-bit weights in groups of inputs, as AWQ and GPTQ store them: w = (code - zero) * scale.

Source: Lin et al. 2023 (arXiv 2306.00978). Shapes: T tokens, K inputs, N outputs, G groups of K / G inputs each.
codes [N, K/2] uint8 hold two inputs a byte, the even one in the low half; scales [N, G] are of the computation's type,
zeros [N, G] are uint8 from 0 to 16. A group has a power of two of inputs, 16 or more, or there is one group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def awq_dequantize_ref(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """(code - zero) * scale, rounded once: [N, K] in the type of the scales."""
    groups = scales.shape[1]
    levels = unpack_codes(codes).unflatten(1, (groups, -1)).to(scales.dtype)  # whole numbers up to 16 are exact in any type
    return ((levels - zeros.unsqueeze(-1).to(scales.dtype)) * scales.unsqueeze(-1)).flatten(1)


def awq_matmul_ref(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """x [T, K] -> [T, N], computed in float64 and rounded once to x's type."""
    return F.linear(x.double(), awq_dequantize_ref(codes, scales.double(), zeros)).to(x.dtype)


def unpack_codes(codes: torch.Tensor) -> torch.Tensor:
    """[N, K/2] bytes -> [N, K] codes, uint8."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


def check_codes(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """Raises ValueError when shapes or types do not fit."""
    if codes.dtype != torch.uint8 or zeros.dtype != torch.uint8 or not scales.is_floating_point():
        raise ValueError(
            f"codes, zeros and scales are {codes.dtype}, {zeros.dtype} and {scales.dtype}; expected uint8, uint8, float"
        )
    if codes.ndim != 2 or scales.ndim != 2 or scales.shape != zeros.shape or len(scales) != len(codes):
        shapes = ", ".join(str(tuple(t.shape)) for t in (codes, scales, zeros))
        raise ValueError(f"codes, scales and zeros are {shapes}; expected [N, K/2], [N, G] and [N, G]")
    inputs, groups = 2 * codes.shape[1], scales.shape[1]
    size = inputs // groups if groups else 0
    if size * groups != inputs or (groups != 1 and (size < 16 or size & (size - 1))):
        raise ValueError(f"{inputs} inputs in {groups} groups; expected one group, or groups of a power of two of 16 or more")
