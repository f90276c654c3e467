"""Products with 4-bit weights as they are stored: what fits is computed by the device's implementation. Letters: reference.py."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F

from vlserve.kernels.int4.cpu import PlainInt4
from vlserve.kernels.int4.reference import awq_dequantize_ref, check_codes
from vlserve.kernels.with_triton import runs_triton

DENSE_ROWS = 128  # from here on a GPU is faster with the weights spread out and its library's product


def awq_dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """As `awq_dequantize_ref`; raises ValueError when shapes or types do not fit."""
    check_codes(codes, scales, zeros)
    if runs_triton(codes):
        from vlserve.kernels.int4.triton import awq_dequantize_triton

        return awq_dequantize_triton(codes, scales, zeros)
    return awq_dequantize_ref(codes, scales, zeros)


def awq_matmul(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """As `awq_matmul_ref`, summed in float32; raises ValueError when shapes or types do not fit.

    Faster are `int4.cpu.pack_for_cpu` or `int4_pairs.pack_for_gpu` once, and the product with what they return. On a GPU this one
    is for what cannot be put in pairs: float32, and groups of 16.
    """
    check_codes(codes, scales, zeros)
    if x.shape[-1] != 2 * codes.shape[1] or x.ndim != 2:
        raise ValueError(f"x is {tuple(x.shape)}, expected [T, {2 * codes.shape[1]}] for codes {tuple(codes.shape)}")
    if not runs_triton(x):
        return PlainInt4(codes, scales, zeros).matmul(x)
    if len(x) >= DENSE_ROWS or x.dtype == torch.float32:  # tensor cores would round it
        return F.linear(x, awq_dequantize(codes, scales, zeros).to(x.dtype))
    from vlserve.kernels.int4.triton import awq_matmul_triton

    return awq_matmul_triton(x, codes, scales, zeros)


def launch_all(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
    """All that `awq_matmul` of any number of rows launches, with zeros, so that it has been compiled; on a GPU with Triton."""
    from vlserve.kernels.int4.triton import awq_dequantize_triton, awq_matmul_triton

    awq_dequantize_triton(codes, scales, zeros)
    if scales.dtype != torch.float32:
        for rows, splits in product((1, 17, 33), (1, 2)):  # one more than each size of a program's rows but the last
            awq_matmul_triton(scales.new_zeros(rows, 2 * codes.shape[1]), codes, scales, zeros, splits=splits)
