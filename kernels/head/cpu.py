"""The head in 8 bits by torch's operators: on a CPU, and wherever the kernel does not run. Letters: reference.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.head.reference import BLOCK

OPERATOR_ROWS = 16  # rows up to which torch's 8-bit operator is faster on a CPU than spreading the weights out
OPERATOR_INPUTS = 32  # a multiple of the inputs that it reads at once; beyond the end it would read foreign memory


def int8_matmul_torch(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """By torch's operators; float32 is exact, 16 bits go through bfloat16, since codes times float16 could leave its range."""
    if x.dtype == torch.float32:
        return _by_blocks(x, codes, scales)
    inputs = x.to(torch.bfloat16).contiguous()
    if not x.is_cuda and len(x) <= OPERATOR_ROWS and x.shape[1] % OPERATOR_INPUTS == 0:
        return torch._weight_int8pack_mm(inputs, codes, scales.to(torch.bfloat16)).to(x.dtype)
    return _by_blocks(inputs, codes, scales).to(x.dtype)


def _by_blocks(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """In x's type, which has every code exactly."""
    out = torch.empty(len(x), len(codes), dtype=x.dtype, device=x.device)
    step = max(1, BLOCK // max(1, x.shape[1]))
    for part, kept in zip(codes.split(step), out.split(step, dim=1), strict=True):
        kept.copy_(F.linear(x, part.to(x.dtype)))
    return out.mul_(scales)
