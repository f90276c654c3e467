"""`head` on a GPU, in 16 and in 8 bits: 8-bit codes become numbers of x's type on the way, sums are float32, a scale comes last.

A program computes all rows of x, up to 64, times some rows of the vocabulary. Letters: reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_N = 64
BLOCK_K = {True: 128, False: 64}  # by whether weights are codes; 128 bytes
STAGES = {True: 3, False: 5}


@triton.jit(do_not_specialize=["num_tokens"])
def _matmul(
    x, weight, scales, out, num_tokens, num_outputs, num_inputs,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_CODED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(row, num_outputs - 1).to(tl.int64)  # beyond the end the last one, which is not stored
    tokens = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    token_there = tokens < num_tokens
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        there = columns < num_inputs
        weights = tl.load(weight + rows[:, None] * num_inputs + columns[None], mask=there[None], other=0)
        inputs = tl.load(x + tokens[:, None] * num_inputs + columns[None], mask=token_there[:, None] & there[None], other=0.0)
        total = tl.dot(inputs, tl.trans(weights.to(x.dtype.element_ty)), total, input_precision="ieee")
    if IS_CODED:
        total *= tl.load(scales + rows)[None]
    places = tokens[:, None] * num_outputs + rows[None]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=token_there[:, None] & (row < num_outputs)[None])


def head_matmul_triton(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's type; the checks are `head_matmul`'s."""
    return _launch(x, weight, None)


def int8_matmul_triton(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's type; the checks are `int8_matmul`'s."""
    return _launch(x, codes, scales.contiguous())


def _launch(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    (num_tokens, num_inputs), num_outputs = x.shape, len(weight)
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    is_coded = scales is not None
    block_t = min(64, max(16, triton.next_power_of_2(num_tokens)))
    with torch.cuda.device_of(x):
        _matmul[(triton.cdiv(num_outputs, BLOCK_N), triton.cdiv(num_tokens, block_t))](
            x, weight, scales, out, num_tokens, num_outputs, num_inputs,
            BLOCK_T=block_t, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K[is_coded], IS_CODED=is_coded, num_stages=STAGES[is_coded],
        )  # fmt: skip
    return out
