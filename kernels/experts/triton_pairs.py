"""Products of chosen experts with 4-bit weights in pairs, as int4_pairs/reference.py has them: two numbers an instruction.

As `triton._matmul` in all else. From a code of int4 its zero point is taken before the product, in x's type, where the difference
is exact: so no sums of x are needed. A code of MXFP4 is put at the places of bfloat16's bits, which is the number over 2^126, and
multiplied by that and by its scale, exactly. float16 has no room for such scales: there they come after the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlserve.kernels.experts.launch import choose_paired_tile
from vlserve.kernels.experts.types import Blocks, PairedExperts, Routes
from vlserve.kernels.int4_pairs.triton import _bits, _factor, _of_groups, _plane, _scales, _words, _zeros
from vlserve.kernels.with_triton import check_contiguous


@triton.jit
def _levels(words, zero, PLANE: tl.constexpr, TYPE: tl.constexpr):
    """A plane of words [N, 16] -> codes less their zero points [N, 32]."""
    MAGIC: tl.constexpr = 1024.0 if tl.float16 == TYPE else 128.0
    numbers = _plane(words >> 4 * PLANE, 0, TYPE)
    return numbers - (zero + MAGIC).to(numbers.dtype)[:, None]


@triton.jit
def _e2m1(words, PLANE: tl.constexpr, PLACE: tl.constexpr, TYPE: tl.constexpr):
    """A plane of words [N, 16] -> numbers of TYPE [N, 32] whose bits from PLACE on are a code's exponent and mantissa."""
    SIGN: tl.constexpr = 12 - 4 * PLANE
    SIZE: tl.constexpr = PLACE - 4 * PLANE
    sign = words << SIGN
    size = (words << SIZE) if SIZE > 0 else (words >> -SIZE)
    pairs = (sign & -0x7FFF8000) | (size & ((0x00070007) << PLACE))
    return tl.reshape(tl.join(_bits(pairs, 0, TYPE), _bits(pairs, 16, TYPE)), (words.shape[0], 32))


@triton.jit
def _add_mxfp4(total, words, scale_words, x_at, k, left, TYPE: tl.constexpr):
    """total [N, T] plus the inputs of a turn, of which `left` are there, times weights with four scales in scale_words [N]."""
    for plane in tl.static_range(4):
        inputs = tl.load(x_at + 32 * plane, mask=(k + 32 * plane < left)[:, None], other=0.0)
        scale = (scale_words >> 8 * plane) & 255
        if tl.float16 == TYPE:
            power = tl.where(scale == 0, 0x00400000, scale << 23).to(tl.float32, bitcast=True)  # 2^-127 is subnormal
            numbers = _e2m1(words, plane, 9, tl.float16) * 16384.0
            total += tl.dot(numbers, inputs) * power[:, None]
        else:
            power = tl.where(scale == 0, 0x0040, scale << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
            numbers = _e2m1(words, plane, 6, tl.bfloat16) * 2.0**126 * power[:, None]
            total = tl.dot(numbers.to(TYPE), inputs, total, input_precision="ieee")
    return total


@triton.jit
def _add_int4(
    total, words, scale_at, zero_at, turn, x_at, k, left,
    GROUP: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """As `_add_mxfp4`, of groups whose scales and zeros begin at scale_at and zero_at."""
    GROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1  # of a turn
    EACH: tl.constexpr = 4 // GROUPS
    for number in tl.static_range(GROUPS):
        group = turn * 128 // GROUP + number
        scale, zero = _scales(tl.load(scale_at + group * 32), TYPE), _zeros(tl.load(zero_at + group * 16))
        product = tl.zeros(total.shape, tl.float32)
        for plane in tl.static_range(number * EACH, number * EACH + EACH):
            inputs = tl.load(x_at + 32 * plane, mask=(k + 32 * plane < left)[:, None], other=0.0)
            product = tl.dot(_levels(words, zero, plane, TYPE), _factor(inputs), product, input_precision="ieee")
        total += scale[:, None] * product
    return total


@triton.jit(do_not_specialize=["num_blocks", "num_experts", "each", "num_groups", "num_tiles", "num_turns"])
def _pairs_matmul(
    x, words, scales, zeros, bias, out, order, blocks,
    num_blocks, num_experts, each, num_outputs, num_inputs, num_groups, num_tiles, num_turns,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a block; `each`: choices that a row of x has. A turn takes 128 inputs. Without zeros: MXFP4."""
    TYPE: tl.constexpr = x.dtype.element_ty
    TILES: tl.constexpr = BLOCK_N // 64
    block, tile = tl.program_id(1), tl.program_id(0) * TILES
    expert = tl.load(blocks + block)
    if expert < 0:
        return
    place = tl.load(blocks + num_blocks + block) + tl.arange(0, BLOCK_T)
    token_there = place < tl.load(blocks + 2 * num_blocks + block)
    choice = tl.load(order + place, mask=token_there, other=0)
    is_ours = expert < num_experts
    before = tl.minimum(expert, num_experts - 1).to(tl.int64) * num_tiles
    word_at = _words(words + before * num_turns * 1024, num_turns, num_tiles, TILES, tile)
    if zeros is None:
        scale_at = _of_groups(scales + before * num_turns * 64, num_turns, num_tiles, TILES, 64, tile)
    else:
        scale_at = _of_groups(scales + before * num_groups * 32, num_groups, num_tiles, TILES, 32, tile)
        zero_at = _of_groups(zeros + before * num_groups * 16, num_groups, num_tiles, TILES, 16, tile)
    k = tl.arange(0, 32)
    x_at = x + (choice // each).to(tl.int64)[None] * num_inputs + k[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for turn in tl.range(0, tl.where(is_ours, num_turns, 0), num_stages=STAGES):
        packed = tl.reshape(tl.load(word_at), (BLOCK_N, 4, 4))  # [n, c, q]: a thread's words lie side by side
        packed = tl.reshape(tl.permute(packed, (0, 2, 1)), (BLOCK_N, 16))
        left = num_inputs - turn * 128
        if zeros is None:
            total = _add_mxfp4(total, packed, tl.load(scale_at), x_at, k, left, TYPE)
            scale_at += 64
        else:
            total = _add_int4(total, packed, scale_at, zero_at, turn, x_at, k, left, GROUP, TYPE)
        word_at += 1024
        x_at += 128
    output = tile * 64 + tl.arange(0, BLOCK_N)
    if bias is not None:
        row = expert.to(tl.int64) * num_outputs + tl.minimum(output, num_outputs - 1)
        total += tl.load(bias + row, mask=is_ours, other=0.0).to(tl.float32)[:, None]
    places = choice.to(tl.int64)[None] * num_outputs + output[:, None]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=token_there[None] & (output < num_outputs)[:, None])


def multiply_pairs(
    x: torch.Tensor, weights: PairedExperts, given: Blocks, routes: Routes, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [T, K] or [T * S, K] -> [T * S, N] in x's type; raises ValueError for float32 and int4, whose scales have 16 bits."""
    if weights.zeros is not None and x.dtype != weights.scales.dtype:
        raise ValueError(f"x is {x.dtype}, expected {weights.scales.dtype} as the scales are")
    check_contiguous(words=weights.words, scales=weights.scales, zeros=weights.zeros, bias=bias)
    check_contiguous(order=given.order, blocks=given.blocks)
    experts, outputs, inputs = weights.size
    tiles, turns = weights.words.shape[1:3]
    tile = choose_paired_tile(given.rows, is_exact=x.dtype == torch.float32)
    zeros = None if weights.zeros is None else weights.zeros.view(torch.int32)
    out = torch.empty(routes.num_choices, outputs, dtype=x.dtype, device=x.device)
    num_blocks = given.blocks.shape[1]
    with torch.cuda.device_of(x):
        _pairs_matmul[(triton.cdiv(outputs, tile.outputs), num_blocks)](
            *(x, weights.words, weights.scales.view(torch.int32), zeros, bias, out, given.order, given.blocks),
            *(num_blocks, experts, routes.per_row(x), outputs, inputs, weights.scales.shape[2], tiles, turns),
            GROUP=weights.group,
            BLOCK_T=given.rows,
            BLOCK_N=tile.outputs,
            STAGES=tile.stages,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    return out
