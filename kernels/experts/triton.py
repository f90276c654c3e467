"""`experts` on a GPU: choices sorted by expert, products of blocks of them with an expert's weights, and the weighted sum.

A program multiplies some outputs of an expert with a block of its choices, in float32 sums; weights are the left factor, so that
codes become numbers of x's type in the registers from which they are multiplied. Scales of groups come after the products of
their inputs, in float32. Choices of other ranks' experts are blocks without inputs: zeros. Letters: reference.py; M blocks.
Source of padded blocks by expert: Gale et al. 2022 (arXiv 2211.15841).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlserve.kernels.experts.launch import FINEST, block_rows, choose_tile, most_blocks, takes_block
from vlserve.kernels.experts.triton_pairs import multiply_pairs
from vlserve.kernels.experts.types import (
    Blocks,
    DenseExperts,
    ExpertWeights,
    Fp8Experts,
    Int4Experts,
    PairedExperts,
    Routes,
)
from vlserve.kernels.with_triton import check_contiguous

IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # no assembler
DENSE, INT4, FP8 = (tl.constexpr(kind) for kind in range(3))
CHUNK = 512  # choices that are sorted at once
COLUMNS = 1024  # that a program adds up

# $2 has four codes; $0 gets the first two's numbers, $1 the others'. 0xEA is (a & b) | c.
BFLOAT16_OF_E4M3 = tl.constexpr("""{
.reg .b32 p, a, b, m, c;
mov.b32 p, $2;
mov.b32 m, 0x7B807B80;
mov.b32 c, 0x80008000;
prmt.b32 a, p, 0, 0x1404;
shr.b32 b, a, 4;
and.b32 b, b, 0x07F007F0;
lop3.b32 a, a, 0x80008000, b, 0xEA;
fma.rn.bf16x2 $0, a, m, c;
prmt.b32 a, p, 0, 0x3424;
shr.b32 b, a, 4;
and.b32 b, b, 0x07F007F0;
lop3.b32 a, a, 0x80008000, b, 0xEA;
fma.rn.bf16x2 $1, a, m, c;
}""")
FLOAT16_OF_E4M3 = tl.constexpr("""{
.reg .b32 p, a, b, m, c;
mov.b32 p, $2;
mov.b32 m, 0x5C005C00;
mov.b32 c, 0x80008000;
prmt.b32 a, p, 0, 0x1404;
shr.b32 b, a, 1;
and.b32 b, b, 0x3F803F80;
lop3.b32 a, a, 0x80008000, b, 0xEA;
fma.rn.f16x2 $0, a, m, c;
prmt.b32 a, p, 0, 0x3424;
shr.b32 b, a, 1;
and.b32 b, b, 0x3F803F80;
lop3.b32 a, a, 0x80008000, b, 0xEA;
fma.rn.f16x2 $1, a, m, c;
}""")


@triton.jit
def _chosen(experts, place, num_choices, num_experts, first):
    """Of the choices at `place`: this rank's expert, E for another rank's, and E + 1 beyond the end."""
    expert = tl.load(experts + place, mask=place < num_choices, other=0) - first
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    return tl.where(place < num_choices, expert, num_experts + 1)


@triton.jit(do_not_specialize=["num_choices", "num_experts", "first", "num_blocks"])
def _sort(
    experts, order, blocks, num_choices, num_experts, first, num_blocks,
    BINS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What one expert has, in the order in which it came, into order [R], and its blocks into blocks [3, M]."""
    expert = tl.program_id(0)
    lane, each = tl.arange(0, CHUNK), tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_choices, CHUNK):
        counts += tl.histogram(_chosen(experts, start + lane, num_choices, num_experts, first), BINS)
    start_at = tl.sum(tl.where(each < expert, counts, 0))
    number = tl.sum(tl.where(each == expert, counts, 0))
    place = start_at
    for start in range(0, num_choices, CHUNK):
        is_mine = _chosen(experts, start + lane, num_choices, num_experts, first) == expert
        nth = tl.cumsum(is_mine.to(tl.int32))
        tl.store(order + place + nth - 1, start + lane, mask=is_mine)
        place += tl.sum(is_mine.to(tl.int32))
    block = tl.sum(tl.where(each < expert, (counts + ROWS - 1) // ROWS, 0))
    mine = (number + ROWS - 1) // ROWS
    for start in range(0, mine, CHUNK):
        nth = start + lane
        begins = start_at + nth * ROWS
        at, there = blocks + block + nth, nth < mine
        tl.store(at, expert + tl.zeros_like(nth), mask=there)
        tl.store(at + num_blocks, begins, mask=there)
        tl.store(at + 2 * num_blocks, tl.minimum(begins + ROWS, start_at + number), mask=there)
    if expert == num_experts:  # the last one
        for start in range(block + mine, num_blocks, CHUNK):
            tl.store(blocks + start + lane, tl.full([CHUNK], -1, tl.int32), mask=start + lane < num_blocks)


@triton.jit
def _e4m3(codes, TYPE: tl.constexpr):
    """E4M3 in uint8 -> numbers, exactly: the bits at the places of a wider type, over a power of two that is multiplied back."""
    if tl.bfloat16 == TYPE:
        if IS_INTERPRETED:
            bits = ((codes.to(tl.int16) & 0x80) << 8) | ((codes.to(tl.int16) & 0x7F) << 4)
            return bits.to(tl.bfloat16, bitcast=True) * 2.0**120
        else:
            return tl.inline_asm_elementwise(BFLOAT16_OF_E4M3, "=r,=r,r", [codes], tl.bfloat16, is_pure=True, pack=4)
    elif tl.float16 == TYPE and not IS_INTERPRETED:
        return tl.inline_asm_elementwise(FLOAT16_OF_E4M3, "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4)
    else:
        bits = ((codes.to(tl.int16) & 0x80) << 8) | ((codes.to(tl.int16) & 0x7F) << 7)
        return bits.to(tl.float16, bitcast=True).to(TYPE) * 256.0


@triton.jit
def _half(packed, zero, scale, x_at, there, IS_FINE: tl.constexpr, TYPE: tl.constexpr):
    """Packed [N, K/2], int16 with a code in the lower four bits, as numbers times the inputs at x_at [K/2, T]."""
    numbers = (packed & 15) - zero
    if IS_FINE:
        numbers = numbers.to(tl.float32) * scale
    inputs = tl.load(x_at, mask=there[:, None], other=0.0)
    return tl.dot(numbers.to(TYPE), inputs, input_precision="ieee")


@triton.jit(do_not_specialize=["num_blocks", "num_experts", "each", "num_groups"])
def _matmul(
    x, codes, scales, zeros, bias, out, order, blocks,
    num_blocks, num_experts, each, num_outputs, num_inputs, num_groups, offset,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of a block; `each`: choices that a row of x has. GROUP: inputs that share a scale, 0 for all of a row."""
    TYPE: tl.constexpr = x.dtype.element_ty
    FINE: tl.constexpr = KIND == INT4 and GROUP > 0 and GROUP < BLOCK_K
    block = tl.program_id(1)
    expert = tl.load(blocks + block)
    if expert < 0:
        return
    place = tl.load(blocks + num_blocks + block) + tl.arange(0, BLOCK_T)
    token_there = place < tl.load(blocks + 2 * num_blocks + block)
    choice = tl.load(order + place, mask=token_there, other=0)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_ours = expert < num_experts
    stop = tl.where(is_ours, num_inputs + offset, 0)
    row = expert.to(tl.int64) * num_outputs + tl.minimum(output, num_outputs - 1)  # beyond the end the last one: not stored
    x_row = (choice // each).to(tl.int64) * num_inputs
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.range(0, stop, BLOCK_K, num_stages=STAGES):
        group = start // GROUP if GROUP else 0
        if KIND != INT4:
            k = start - offset + tl.arange(0, BLOCK_K)
            there = (k >= 0) & (k < num_inputs) if KIND == FP8 else k < num_inputs
            numbers = tl.load(codes + row[:, None] * num_inputs + k[None], mask=there[None], other=0)
            inputs = tl.load(x + x_row[None] + k[:, None], mask=there[:, None], other=0.0)
            if KIND == DENSE:
                total = tl.dot(numbers, inputs, total, input_precision="ieee")
            elif GROUP == 0:
                total = tl.dot(_e4m3(numbers, TYPE), inputs, total, input_precision="ieee")
            else:
                scale = tl.load(scales + row * num_groups + group)
                total += tl.dot(_e4m3(numbers, TYPE), inputs, input_precision="ieee") * scale[:, None]
        else:
            pair = start // 2 + tl.arange(0, BLOCK_K // 2)
            there = pair < num_inputs // 2
            packed = tl.load(codes + row[:, None] * (num_inputs // 2) + pair[None], mask=there[None], other=0).to(tl.int16)
            x_at = x + x_row[None] + 2 * pair[:, None]
            at = row[:, None] * num_groups + (tl.minimum(2 * pair // GROUP, num_groups - 1)[None] if FINE else group)
            zero, scale = tl.load(zeros + at).to(tl.int16), tl.load(scales + at).to(tl.float32)
            product = _half(packed, zero, scale, x_at, there, FINE, TYPE)
            product += _half(packed >> 4, zero, scale, x_at + 1, there, FINE, TYPE)
            total += product if FINE else product * scale
    if KIND == FP8 and GROUP == 0:
        total *= tl.load(scales + row, mask=is_ours, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + row, mask=is_ours, other=0.0).to(tl.float32)[:, None]
    places = choice.to(tl.int64)[None] * num_outputs + output[:, None]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=token_there[None] & (output < num_outputs)[:, None])


@triton.jit
def _combine(out, weights, result, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """One token's choices, added up in their order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for number in tl.static_range(CHOICES):
        row = token * CHOICES + number
        numbers = tl.load(out + row * width + column, mask=there, other=0.0).to(tl.float32)
        total += numbers * tl.load(weights + row)
    tl.store(result + token * width + column, total.to(result.dtype.element_ty), mask=there)


def routes_triton(experts: torch.Tensor, num_experts: int, first: int) -> Routes:
    """experts [T, S] int32 -> routes with blocks."""
    experts = experts.contiguous()
    choices = experts.numel()
    rows = block_rows(choices, num_experts)
    num_blocks = most_blocks(choices, num_experts, rows)
    order = torch.empty(choices, dtype=torch.int32, device=experts.device)
    blocks = torch.empty(3, num_blocks, dtype=torch.int32, device=experts.device)
    with torch.cuda.device_of(experts):
        _sort[(num_experts + 1,)](
            *(experts, order, blocks, choices, num_experts, first, num_blocks),
            BINS=triton.next_power_of_2(num_experts + 2),
            CHUNK=CHUNK,
            ROWS=rows,
        )
    return Routes(experts=experts, num_experts=num_experts, first=first, blocks=Blocks(order=order, blocks=blocks, rows=rows))


def experts_matmul_triton(x: torch.Tensor, weights: ExpertWeights, routes: Routes, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] or [T * S, K] -> [T * S, N] in x's type; the checks are `experts_matmul`'s."""
    x = x.contiguous()
    given = blocks_of(routes)
    experts, outputs, inputs = weights.size
    if isinstance(weights, PairedExperts):
        return multiply_pairs(x, weights, given, routes, bias)
    kind, codes, scales, zeros, group, offset = _stored(weights)
    check_contiguous(weights=codes, scales=scales, zeros=zeros, bias=bias, order=given.order, blocks=given.blocks)
    tile = choose_tile(given.rows, is_exact=x.dtype == torch.float32, is_coded=kind != DENSE, group=group)
    out = torch.empty(routes.num_choices, outputs, dtype=x.dtype, device=x.device)
    num_blocks = given.blocks.shape[1]
    with torch.cuda.device_of(x):
        _matmul[(triton.cdiv(outputs, tile.outputs), num_blocks)](
            *(x, codes, scales, zeros, bias, out, given.order, given.blocks),
            *(num_blocks, experts, routes.per_row(x), outputs, inputs, 1 if scales is None else scales.shape[2], offset),
            KIND=kind.value,
            GROUP=group,
            BLOCK_T=given.rows,
            BLOCK_N=tile.outputs,
            BLOCK_K=tile.inputs,
            STAGES=tile.stages,
            num_warps=tile.warps,
            maxnreg=tile.registers,
        )
    return out


def combine_triton(out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """out [T * S, C], weights [T, S] float32 -> [T, C] in out's type; the checks are `combine`'s."""
    out, weights = out.contiguous(), weights.contiguous()
    (tokens, choices), width = weights.shape, out.shape[1]
    result = torch.empty(tokens, width, dtype=out.dtype, device=out.device)
    with torch.cuda.device_of(out):
        _combine[(tokens, triton.cdiv(width, COLUMNS))](out, weights, result, width, CHOICES=choices, BLOCK=COLUMNS)
    return result


def blocks_of(routes: Routes) -> Blocks:
    if routes.blocks is None:
        raise ValueError("these routes were made for torch's operators, on another device than the weights")
    return routes.blocks


def _stored(weights: ExpertWeights) -> tuple[tl.constexpr, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int]:
    """(kind, codes, scales, zeros, inputs that share a scale or 0, inputs before the first)."""
    match weights:
        case DenseExperts():
            return DENSE, weights.weight, None, None, 0, 0
        case Int4Experts():
            groups = weights.scales.shape[2]
            return INT4, weights.codes, weights.scales, weights.zeros, 0 if groups == 1 else weights.size[2] // groups, 0
        case Fp8Experts():
            block = weights.block or 0
            if not takes_block(block):
                raise ValueError(f"FP8 in blocks of {block} inputs; expected a power of two of {FINEST} or more")
            return FP8, weights.codes.view(torch.uint8), weights.scales, None, block, weights.offset if block else 0
    raise ValueError(f"a GPU multiplies with no {type(weights).__name__}; expected weights as `prepare` gives them there")
