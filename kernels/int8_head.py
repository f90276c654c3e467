"""The language model's head in 8 bits: each row of the vocabulary has whole numbers from -127 to 127 and one scale.

Shapes: T rows of hidden states, K hidden size, N rows of the vocabulary. codes [N, K] int8, scales [N] float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.with_triton import runs_triton

OPERATOR_ROWS = 16  # rows up to which torch's 8-bit operator is faster on a CPU than spreading the weights out
OPERATOR_INPUTS = 32  # a multiple of the inputs that it reads at once; beyond the end it would read foreign memory
BLOCK = 2**19  # weights that are spread out at once, so that they stay in the processor's cache


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


def int8_matmul(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """As `int8_matmul_ref`, summed in float32; raises ValueError when shapes or types do not fit."""
    if codes.dtype != torch.int8 or scales.dtype != torch.float32:
        raise ValueError(f"codes and scales are {codes.dtype} and {scales.dtype}; expected int8 and float32")
    if x.ndim != 2 or codes.ndim != 2 or x.shape[1] != codes.shape[1] or scales.shape != codes.shape[:1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, codes, scales))
        raise ValueError(f"x, codes and scales are {shapes}; expected [T, K], [N, K] and [N]")
    if x.dtype != torch.float32 and runs_triton(x):  # whose sums of products would not fit registers, nor tensor cores
        from vlserve.kernels.head_triton import int8_matmul_triton

        return int8_matmul_triton(x, codes, scales)
    return int8_matmul_torch(x, codes, scales)


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
