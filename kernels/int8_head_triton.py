"""`int8_head` on a GPU: codes become numbers of x's type on the way, sums are float32, and the scale comes last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _matmul(
    x, codes, scales, out, num_tokens, num_outputs, num_inputs,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    tokens = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    row_there, token_there = rows < num_outputs, tokens < num_tokens
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        there = columns < num_inputs
        weights = tl.load(codes + rows[:, None] * num_inputs + columns[None], mask=row_there[:, None] & there[None], other=0)
        inputs = tl.load(x + tokens[:, None] * num_inputs + columns[None], mask=token_there[:, None] & there[None], other=0.0)
        total += tl.dot(inputs, tl.trans(weights.to(x.dtype.element_ty)), input_precision="ieee")
    total *= tl.load(scales + rows, mask=row_there, other=0.0)[None]
    places = tokens[:, None] * num_outputs + rows[None]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=token_there[:, None] & row_there[None])


def int8_matmul_triton(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's type; the checks are `int8_matmul`'s."""
    x, codes, scales = x.contiguous(), codes.contiguous(), scales.contiguous()
    (num_tokens, num_inputs), num_outputs = x.shape, len(codes)
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    block_t, block_n, block_k = min(64, max(16, triton.next_power_of_2(num_tokens))), 64, 128
    _matmul[(triton.cdiv(num_outputs, block_n), triton.cdiv(num_tokens, block_t))](
        x, codes, scales, out, num_tokens, num_outputs, num_inputs, BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=block_k
    )
    return out
