"""Linear layers with 4-bit weights in groups of inputs, as AWQ and GPTQ store them: w = (code - zero) * scale.

Source: Lin et al. 2023 (arXiv 2306.00978). Shapes: T tokens, K inputs, N outputs, G groups of K / G inputs each.
codes [N, K/2] uint8 hold two inputs a byte, the even one in the low half; scales [N, G] are of the computation's type,
zeros [N, G] are uint8 from 0 to 16. A group has a power of two of inputs, 16 or more, or there is one group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.with_triton import runs_triton

DENSE_ROWS = 128  # from here on a GPU is faster with the weights spread out and its library's product


def awq_dequantize_ref(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """(code - zero) * scale, rounded once: [N, K] in the type of the scales."""
    groups = scales.shape[1]
    levels = unpack_codes(codes).unflatten(1, (groups, -1)).to(scales.dtype)  # whole numbers up to 16 are exact in any type
    return ((levels - zeros.unsqueeze(-1).to(scales.dtype)) * scales.unsqueeze(-1)).flatten(1)


def awq_matmul_ref(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """x [T, K] -> [T, N], computed in float64 and rounded once to x's type."""
    return F.linear(x.double(), awq_dequantize_ref(codes, scales.double(), zeros)).to(x.dtype)


def awq_dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """As `awq_dequantize_ref`; raises ValueError when shapes or types do not fit."""
    _check(codes, scales, zeros)
    if runs_triton(codes):
        from vlserve.kernels.awq_triton import awq_dequantize_triton

        return awq_dequantize_triton(codes, scales, zeros)
    return awq_dequantize_ref(codes, scales, zeros)


def awq_matmul(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """As `awq_matmul_ref`, summed in float32; raises ValueError when shapes or types do not fit.

    Faster are `awq_cpu.pack_for_cpu` or `awq_pairs.pack_for_gpu` once, and the product with what they return. On a GPU this one
    is for what cannot be put in pairs: float32, and groups of 16.
    """
    _check(codes, scales, zeros)
    if x.shape[-1] != 2 * codes.shape[1] or x.ndim != 2:
        raise ValueError(f"x is {tuple(x.shape)}, expected [T, {2 * codes.shape[1]}] for codes {tuple(codes.shape)}")
    if not runs_triton(x):
        from vlserve.kernels.awq_cpu import PlainInt4

        return PlainInt4(codes, scales, zeros).matmul(x)
    if len(x) >= DENSE_ROWS or x.dtype == torch.float32:  # tensor cores would round it
        return F.linear(x, awq_dequantize(codes, scales, zeros).to(x.dtype))
    from vlserve.kernels.awq_triton import awq_matmul_triton

    return awq_matmul_triton(x, codes, scales, zeros)


def unpack_codes(codes: torch.Tensor) -> torch.Tensor:
    """[N, K/2] bytes -> [N, K] codes, uint8."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


def _check(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
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
