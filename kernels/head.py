"""The language model's head in 16 bits. The few rows of a decode step have a kernel that reads each weight once.

Shapes: T rows of hidden states, K hidden size, N rows of the vocabulary. weight [N, K].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.with_triton import runs_triton

KERNEL_ROWS = 16  # what a tensor core multiplies at once; more rows are torch's
KERNEL_TYPES = (torch.bfloat16, torch.float16)


def head_matmul_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] times weight^T -> [T, N], computed in float64 and rounded once to x's type."""
    return F.linear(x.double(), weight.double()).to(x.dtype)


def head_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `head_matmul_ref`, summed in float32; raises ValueError when shapes or types do not fit."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x and weight are {tuple(x.shape)} and {tuple(weight.shape)}; expected [T, K] and [N, K]")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} but weight is {weight.dtype}; expected one type")
    if len(x) <= KERNEL_ROWS and x.dtype in KERNEL_TYPES and runs_triton(x):
        from vlserve.kernels.head_triton import head_matmul_triton

        return head_matmul_triton(x, weight)
    return F.linear(x, weight)
