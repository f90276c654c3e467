"""`group_sums` on a GPU: a kernel of its own, and what other kernels call with activations that they have just rounded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vlserve.kernels.group_sums.reference import INPUTS, groups_of
from vlserve.kernels.with_triton import check_contiguous

BLOCKS = 16  # of a program


@triton.jit
def store_sums(sums, numbers, block, num_blocks, token, num_tokens, GROUPS: tl.constexpr):
    """numbers, of token's blocks `block` [B], which lie side by side, zeros behind the last input -> sums [num_blocks, S, T]."""
    B: tl.constexpr = block.shape[0]
    there = (block < num_blocks)[:, None]
    planes = tl.sum(tl.reshape(numbers.to(tl.float32), (B, 4, 32)), 2)
    plain = tl.sum(tl.reshape(planes, (B, GROUPS, 4 // GROUPS)), 2)
    groups = (block[:, None] * GROUPS + tl.arange(0, GROUPS)[None]).to(tl.int64)
    if numbers.dtype == tl.float16:
        magic = tl.where(tl.arange(0, 4) % 2 == 0, 1024.0, 64.0)[None]  # reference.MAGIC
        offset = tl.sum(tl.reshape(planes * magic, (B, GROUPS, 4 // GROUPS)), 2)
        tl.store(sums + 2 * groups * num_tokens + token, plain, mask=there)
        tl.store(sums + (2 * groups + 1) * num_tokens + token, offset, mask=there)
    else:
        tl.store(sums + groups * num_tokens + token, plain, mask=there)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _kernel(x, sums, num_tokens, num_blocks, GROUPS: tl.constexpr, BLOCKS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    places = (token * num_blocks + block)[:, None] * 128 + tl.arange(0, 128)[None]
    numbers = tl.load(x + places, mask=(block < num_blocks)[:, None], other=0.0)
    store_sums(sums, numbers, block, num_blocks, token, num_tokens, GROUPS)


def group_sums_triton(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """As `group_sums_ref`; what is no whole number of blocks is copied first."""
    check_contiguous(out=out)
    groups, num_blocks, missing = groups_of(out, x), len(out), -x.shape[1] % INPUTS
    x = F.pad(x, (0, missing)) if missing else x.contiguous()
    with torch.cuda.device_of(x):
        _kernel[(len(x), triton.cdiv(num_blocks, BLOCKS))](x, out, len(x), num_blocks, GROUPS=groups, BLOCKS=BLOCKS)
    return out
