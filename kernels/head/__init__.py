"""The language model's head. The few rows of a decode step have a kernel that reads each weight once. Letters: reference.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.head.cpu import int8_matmul_torch
from vlserve.kernels.with_triton import runs_triton

KERNEL_ROWS = 16  # what a tensor core multiplies at once; more rows are torch's
KERNEL_TYPES = (torch.bfloat16, torch.float16)


def head_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `head_matmul_ref`, summed in float32; raises ValueError when shapes or types do not fit."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x and weight are {tuple(x.shape)} and {tuple(weight.shape)}; expected [T, K] and [N, K]")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} but weight is {weight.dtype}; expected one type")
    if len(x) <= KERNEL_ROWS and x.dtype in KERNEL_TYPES and runs_triton(x):
        from vlserve.kernels.head.triton import head_matmul_triton

        return head_matmul_triton(x, weight)
    return F.linear(x, weight)


def int8_matmul(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """As `int8_matmul_ref`, summed in float32; raises ValueError when shapes or types do not fit."""
    if codes.dtype != torch.int8 or scales.dtype != torch.float32:
        raise ValueError(f"codes and scales are {codes.dtype} and {scales.dtype}; expected int8 and float32")
    if x.ndim != 2 or codes.ndim != 2 or x.shape[1] != codes.shape[1] or scales.shape != codes.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, codes, scales))
        raise ValueError(f"x, codes and scales are {shapes}; expected [T, K], [N, K] and [N]")
    if x.dtype != torch.float32 and runs_triton(x):  # whose sums of products would not fit registers, nor tensor cores
        from vlserve.kernels.head.triton import int8_matmul_triton

        return int8_matmul_triton(x, codes, scales)
    return int8_matmul_torch(x, codes, scales)
