"""`int4` on a GPU: a product that takes the codes apart on the way, with float32 sums, and the plain dequantisation.

Even and odd inputs are multiplied apart, since a byte holds one of each; then no code has to move to another place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FINEST = 32  # inputs of a block at least: a product within the tensor cores takes 16, and a block is two of them


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def _matmul(
    x, codes, scales, zeros, out, num_tokens, num_outputs, num_inputs, num_groups, splits,
    GROUP: tl.constexpr, ONE_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Blocks of inputs part, part + splits, ... into out [splits, T, N]; ONE_GROUP: no block has inputs of two groups."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    tokens = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    part = tl.program_id(2)
    row_there, token_there = rows < num_outputs, tokens < num_tokens
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(part * BLOCK_K, num_inputs, splits * BLOCK_K):
        pairs = start // 2 + tl.arange(0, BLOCK_K // 2)
        there = pairs < num_inputs // 2
        packed = tl.load(codes + rows[:, None] * (num_inputs // 2) + pairs[None], mask=row_there[:, None] & there[None], other=0)
        inputs = x + tokens[:, None] * num_inputs + 2 * pairs[None]
        even = tl.load(inputs, mask=token_there[:, None] & there[None], other=0.0)
        odd = tl.load(inputs + 1, mask=token_there[:, None] & there[None], other=0.0)
        low, high = (packed & 15).to(tl.int32), (packed >> 4).to(tl.int32)
        if ONE_GROUP:  # whole numbers go into the products, and the scale comes after them, in float32
            places = rows * num_groups + start // GROUP
            zero = tl.load(zeros + places, mask=row_there, other=0).to(tl.int32)[:, None]
            scale = tl.load(scales + places, mask=row_there, other=0.0).to(tl.float32)
            low_weights, high_weights = (low - zero).to(x.dtype.element_ty), (high - zero).to(x.dtype.element_ty)
            product = tl.dot(even, tl.trans(low_weights), input_precision="ieee")
            product += tl.dot(odd, tl.trans(high_weights), input_precision="ieee")
            total += product * scale[None]
        else:
            places = rows[:, None] * num_groups + (2 * pairs // GROUP)[None]
            zero = tl.load(zeros + places, mask=row_there[:, None] & there[None], other=0).to(tl.int32)
            scale = tl.load(scales + places, mask=row_there[:, None] & there[None], other=0.0).to(tl.float32)
            low_weights = ((low - zero).to(tl.float32) * scale).to(x.dtype.element_ty)
            high_weights = ((high - zero).to(tl.float32) * scale).to(x.dtype.element_ty)
            total += tl.dot(even, tl.trans(low_weights), input_precision="ieee")
            total += tl.dot(odd, tl.trans(high_weights), input_precision="ieee")
    places = (part.to(tl.int64) * num_tokens + tokens)[:, None] * num_outputs + rows[None]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=token_there[:, None] & row_there[None])


@triton.jit
def _dequantize(
    codes, scales, zeros, out, num_outputs, num_inputs, num_groups,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    pairs = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    there = (rows < num_outputs)[:, None] & (pairs < num_inputs // 2)[None]
    packed = tl.load(codes + rows[:, None] * (num_inputs // 2) + pairs[None], mask=there, other=0)
    places = rows[:, None] * num_groups + (2 * pairs // GROUP)[None]
    zero = tl.load(zeros + places, mask=there, other=0).to(tl.int32)
    scale = tl.load(scales + places, mask=there, other=0.0).to(tl.float32)
    low = ((packed & 15).to(tl.int32) - zero).to(tl.float32) * scale
    high = ((packed >> 4).to(tl.int32) - zero).to(tl.float32) * scale
    inputs = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    stored = (rows < num_outputs)[:, None] & (inputs < num_inputs)[None]
    weights = tl.interleave(low, high).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * num_inputs + inputs[None], weights, mask=stored)


def awq_matmul_triton(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, *, splits: int | None = None
) -> torch.Tensor:
    """x [T, K] -> [T, N]; the checks are `awq_matmul`'s.

    Args:
        splits: parts that the inputs are summed in, side by side; None for as many as keep the device busy.
    """
    x, codes, scales, zeros = (t.contiguous() for t in (x, codes, scales, zeros))
    (num_tokens, num_inputs), (num_outputs, num_groups) = x.shape, scales.shape
    group = num_inputs // num_groups
    block_t, block_n = min(64, max(16, triton.next_power_of_2(num_tokens))), 64
    block_k = max(FINEST, min(128, triton.next_power_of_2(group)))
    grid = (triton.cdiv(num_outputs, block_n), triton.cdiv(num_tokens, block_t))
    if splits is None:
        splits = _splits(grid[0] * grid[1], triton.cdiv(num_inputs, block_k), x.device)
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, num_tokens, num_outputs, dtype=dtype, device=x.device)
    _matmul[(*grid, splits)](
        x, codes, scales, zeros, out, num_tokens, num_outputs, num_inputs, num_groups, splits,
        GROUP=group, ONE_GROUP=num_groups == 1 or group % block_k == 0,
        BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


def awq_dequantize_triton(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """[N, K] in the type of the scales; the checks are `awq_dequantize`'s."""
    codes, scales, zeros = (t.contiguous() for t in (codes, scales, zeros))
    (num_outputs, num_groups), num_inputs = scales.shape, 2 * codes.shape[1]
    out = torch.empty(num_outputs, num_inputs, dtype=scales.dtype, device=codes.device)
    block_n, block_k = 16, 256
    _dequantize[(triton.cdiv(num_outputs, block_n), triton.cdiv(num_inputs, block_k))](
        codes, scales, zeros, out, num_outputs, num_inputs, num_groups,
        GROUP=num_inputs // num_groups, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return out


def _splits(programs: int, blocks: int, device: torch.device) -> int:
    """So many that each multiprocessor has two programs, each with four blocks of inputs or more."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, blocks // 4))
