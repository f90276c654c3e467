"""`int4_pairs` on a GPU: products of up to 128 rows that read each weight once, and the dequantisation for more rows.

A product multiplies, in float32 sums, numbers that are a magic number plus a code, and takes magic number and zero point, times
the sums of each group's activations (`group_sums`), off what comes out, before the scale; where the inputs are split, a second
kernel adds the parts up, in their order. The weights are the left factor: so each thread's registers hold what it has loaded
itself. With float16 every second plane of codes is used where it lies, 4 bits up, as 16 times itself.
Source of magic numbers and of the order in words: Kim et al. 2022 (arXiv 2211.10017); of the split: arXiv 2402.00025.
Letters and layout: reference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlserve.kernels.int4_pairs.launch import ROWS, Launch, choose, device_of, split
from vlserve.kernels.int4_pairs.types import PairedCodes
from vlserve.kernels.with_triton import check_contiguous

REDUCED = 256  # outputs of a program that adds up parts
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # no assembler, and bfloat16 is taken for whole numbers


@triton.jit
def _bits(words, FROM: tl.constexpr, TYPE: tl.constexpr):
    return ((words >> FROM) & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True)


@triton.jit
def _plane(words, PLANE: tl.constexpr, TYPE: tl.constexpr):
    """words [N, 16] -> [N, 32] of magic number plus code, or plus 16 times the code in float16's odd planes."""
    HALF: tl.constexpr = tl.float16 == TYPE
    SHIFT: tl.constexpr = PLANE // 2 * 8 if HALF else PLANE * 4
    MASK: tl.constexpr = 0x00F000F0 if HALF and PLANE % 2 == 1 else 0x000F000F
    MAGIC: tl.constexpr = 0x64006400 if HALF else 0x43004300
    if IS_INTERPRETED:
        pairs = ((words >> SHIFT) & MASK) | MAGIC
    else:  # the same, of which the compiler makes two instructions
        pairs = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [words >> SHIFT, MASK, MAGIC], dtype=tl.int32, is_pure=True, pack=1
        )
    both = tl.join(_bits(pairs, 0, TYPE), _bits(pairs, 16, TYPE))
    return _factor(tl.reshape(both, (words.shape[0], 32)))


@triton.jit
def _factor(numbers):
    """As the products take them."""
    if IS_INTERPRETED:
        return numbers.to(tl.float32)
    else:
        return numbers


@triton.jit
def _scales(words, TYPE: tl.constexpr):
    """[N/2] words of two scales -> [N] float32, in the order of the outputs."""
    both = tl.join(_bits(words, 0, TYPE), _bits(words, 16, TYPE))  # [u v r, h]
    turned = tl.permute(tl.reshape(both, (words.shape[0] // 8, 8, 2)), (0, 2, 1))
    return tl.reshape(turned, (2 * words.shape[0],)).to(tl.float32)


@triton.jit
def _zeros(words):
    """[N/4] words of four zeros -> [N] float32, in the order of the outputs."""
    first = tl.join(words & 255, (words >> 8) & 255)
    second = tl.join((words >> 16) & 255, (words >> 24) & 255)
    four = tl.reshape(tl.join(first, second), (words.shape[0] // 16, 2, 8, 2, 2))  # [tile, v, r, h, u]
    return tl.reshape(tl.permute(four, (0, 4, 1, 3, 2)), (4 * words.shape[0],)).to(tl.float32)


@triton.jit
def _words(at, num_blocks, num_tiles, TILES: tl.constexpr, tile):
    """Pointers to the first block's words of TILES tiles from `tile`, [64 TILES, 16]; beyond the end, the last tile's."""
    row = tl.arange(0, 64 * TILES)
    tiles = tl.minimum(tile + row // 64, num_tiles - 1) if TILES > 1 else tile + row // 64
    places = tiles.to(tl.int64) * num_blocks * 1024 + row % 64 * 16
    return at + places[:, None] + tl.arange(0, 16)[None]


@triton.jit
def _of_groups(at, num_groups, num_tiles, TILES: tl.constexpr, WIDTH: tl.constexpr, tile):
    """As `_words`, to what the first group has, of WIDTH words a tile: [WIDTH TILES]."""
    place = tl.arange(0, WIDTH * TILES)
    tiles = tl.minimum(tile + place // WIDTH, num_tiles - 1) if TILES > 1 else tile + place // WIDTH
    return at + tiles.to(tl.int64) * num_groups * WIDTH + place % WIDTH


@triton.jit
def _add_planes(
    product, words, x_at, token_there,
    FIRST: tl.constexpr, LAST: tl.constexpr, STEP: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """product [N, T] plus the planes FIRST, FIRST + STEP, ... before LAST of words [N, 16] times their inputs."""
    for plane in tl.static_range(FIRST, LAST, STEP):
        inputs = _factor(tl.load(x_at + 32 * plane, mask=token_there, other=0.0))
        product = tl.dot(_plane(words, plane, TYPE), inputs, product, input_precision="ieee")
    return product


@triton.jit
def _add_group(
    product, words, zero, x_at, sum_at, num_tokens, token_there,
    NUMBER: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """product, of zeros, plus (codes - zero) times the inputs of a block's group NUMBER, of GROUPS."""
    FIRST: tl.constexpr = NUMBER * (4 // GROUPS)
    LAST: tl.constexpr = FIRST + 4 // GROUPS
    if tl.float16 == TYPE:  # odd planes are 16 times themselves
        plain = tl.load(sum_at + 2 * NUMBER * num_tokens, mask=token_there, other=0.0)
        offset = tl.load(sum_at + (2 * NUMBER + 1) * num_tokens, mask=token_there, other=0.0)
        product = _add_planes(product, words, x_at, token_there, FIRST // 2 * 2 + 1, LAST, 2, TYPE)
        product = product * 0.0625 - offset
        product = _add_planes(product, words, x_at, token_there, (FIRST + 1) // 2 * 2, LAST, 2, TYPE)
        return product - plain * zero
    plain = tl.load(sum_at + NUMBER * num_tokens, mask=token_there, other=0.0)
    product = _add_planes(product, words, x_at, token_there, FIRST, LAST, 1, TYPE)
    return product - plain * (zero + 128.0)


@triton.jit(do_not_specialize=["num_tokens", "num_outputs", "num_blocks", "num_groups", "num_tiles", "blocks_each"])
def _matmul(
    x, words, scales, zeros, sums, out, num_tokens, num_outputs, num_blocks, num_groups, num_tiles, blocks_each,
    GROUP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Blocks part * blocks_each, ... of the inputs into out [parts, T, N]."""
    TYPE: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = tl.float16 == TYPE
    TILES: tl.constexpr = BLOCK_N // 64
    GROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1  # of a block
    SUMS: tl.constexpr = GROUPS * 2 if HALF else GROUPS
    part, tile = tl.program_id(2), tl.program_id(0) * TILES
    first = part * blocks_each
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_there = (token < num_tokens)[None]
    word_at = _words(words, num_blocks, num_tiles, TILES, tile) + first.to(tl.int64) * 1024
    scale_at = _of_groups(scales, num_groups, num_tiles, TILES, 32, tile)
    zero_at = _of_groups(zeros, num_groups, num_tiles, TILES, 16, tile)
    x_at = x + (token.to(tl.int64)[None] * num_blocks + first) * 128 + tl.arange(0, 32)[:, None]
    sum_at = sums + first.to(tl.int64) * SUMS * num_tokens + token[None]
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for block in tl.range(first, tl.minimum(first + blocks_each, num_blocks), num_stages=STAGES):
        packed = tl.reshape(tl.load(word_at), (BLOCK_N, 4, 4))  # [n, c, q]: a thread's words lie side by side
        packed = tl.reshape(tl.permute(packed, (0, 2, 1)), (BLOCK_N, 16))
        for number in tl.static_range(GROUPS):
            group = block * 128 // GROUP + number
            scale = _scales(tl.load(scale_at + group * 32), TYPE)[:, None]
            zero = _zeros(tl.load(zero_at + group * 16))[:, None]
            product = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            total += scale * _add_group(product, packed, zero, x_at, sum_at, num_tokens, token_there, number, GROUPS, TYPE)
        word_at += 1024
        x_at += 128
        sum_at += SUMS * num_tokens
    output = tile * 64 + tl.arange(0, BLOCK_N)
    places = (part.to(tl.int64) * num_tokens + token)[None] * num_outputs + output[:, None]
    tl.store(out + places, total.to(out.dtype.element_ty), mask=token_there & (output < num_outputs)[:, None])


@triton.jit(do_not_specialize=["num_parts", "size"])
def _add_parts(parts, out, num_parts, size, BLOCK: tl.constexpr):
    """parts [P, T * N] float32 -> their sum in out's type."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < size
    total = tl.zeros([BLOCK], tl.float32)
    at = parts + place
    for _ in range(num_parts):
        total += tl.load(at, mask=there, other=0.0)
        at += size
    tl.store(out + place, total.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_outputs", "num_blocks", "num_groups"])
def _dequantize(words, scales, zeros, out, num_outputs, num_blocks, num_groups, GROUP: tl.constexpr):
    """One block of one tile into out [N, K'], rounded once."""
    TYPE: tl.constexpr = out.dtype.element_ty
    GROUPS: tl.constexpr = 128 // GROUP if GROUP < 128 else 1
    tile, block = tl.program_id(0), tl.program_id(1)
    packed = tl.load(_words(words, num_blocks, 0, 1, tile) + block.to(tl.int64) * 1024)
    packed = tl.reshape(tl.permute(tl.reshape(packed, (64, 4, 4)), (0, 2, 1)), (64, 16))
    output = tile * 64 + tl.arange(0, 64)
    at = out + (output.to(tl.int64)[:, None] * num_blocks + block) * 128 + tl.arange(0, 32)[None]
    for plane in tl.static_range(4):
        group = block * 128 // GROUP + plane * GROUPS // 4
        scale = _scales(tl.load(_of_groups(scales, num_groups, 0, 1, 32, tile) + group * 32), TYPE)
        zero = _zeros(tl.load(_of_groups(zeros, num_groups, 0, 1, 16, tile) + group * 16))
        codes = tl.join((packed >> 4 * plane) & 15, (packed >> (4 * plane + 16)) & 15)
        weights = (tl.reshape(codes, (64, 32)).to(tl.float32) - zero[:, None]) * scale[:, None]
        tl.store(at + 32 * plane, weights.to(TYPE), mask=(output < num_outputs)[:, None])


def pairs_matmul_triton(x: torch.Tensor, sums: torch.Tensor, packed: PairedCodes) -> torch.Tensor:
    """x [T, K'] and its `group_sums` -> [T, N] in x's type; the checks are `PairedCodes.matmul`'s."""
    x = x.contiguous()
    architecture, multiprocessors = device_of(x.device.index)
    launch = choose(architecture, len(x), packed.outputs, x.dtype)
    programs = triton.cdiv(packed.outputs, launch.block_n) * triton.cdiv(len(x), launch.block_t)
    parts = split(launch, programs, packed.words.shape[1], multiprocessors)
    return multiply(x, packed, sums, launch, parts)


def launch_all(x: torch.Tensor, sums: torch.Tensor, packed: PairedCodes) -> None:
    """As `pairs_matmul_triton`, launched as for every number of rows, the inputs in one part and in two."""
    architecture, _ = device_of(x.device.index)
    for launch in {choose(architecture, rows, packed.outputs, x.dtype) for rows in ROWS}:
        for parts in range(1, 1 + min(2, packed.words.shape[1])):
            multiply(x, packed, sums, launch, parts)


def multiply(x: torch.Tensor, packed: PairedCodes, sums: torch.Tensor, launch: Launch, parts: int) -> torch.Tensor:
    """As `pairs_matmul_triton`, launched as given, the inputs in `parts`."""
    out = torch.empty(len(x), packed.outputs, dtype=x.dtype, device=x.device)
    if parts == 1:
        multiply_parts(x, packed, sums, launch, out[None])
        return out
    workspace = torch.empty(parts, *out.shape, dtype=torch.float32, device=x.device)
    multiply_parts(x, packed, sums, launch, workspace)
    with torch.cuda.device_of(x):
        _add_parts[(triton.cdiv(out.numel(), REDUCED),)](workspace, out, parts, out.numel(), BLOCK=REDUCED)
    return out


def multiply_parts(x: torch.Tensor, packed: PairedCodes, sums: torch.Tensor, launch: Launch, out: torch.Tensor) -> None:
    """Part p of the inputs into out [P, T, N]."""
    check_contiguous(x=x, words=packed.words, scales=packed.scales, zeros=packed.zeros, sums=sums, out=out)
    num_blocks, num_groups = packed.words.shape[1], packed.scales.shape[1]
    tiles = triton.cdiv(packed.outputs, launch.block_n), triton.cdiv(len(x), launch.block_t)
    with torch.cuda.device_of(x):
        _matmul[(*tiles, len(out))](
            *(x, packed.words, packed.scales.view(torch.int32), packed.zeros.view(torch.int32), sums, out),
            *(len(x), packed.outputs, num_blocks, num_groups, len(packed.words), triton.cdiv(num_blocks, len(out))),
            GROUP=packed.group,
            BLOCK_T=launch.block_t,
            BLOCK_N=launch.block_n,
            STAGES=launch.stages,
            num_warps=launch.warps,
            maxnreg=launch.registers,
        )


def pairs_dequantize_triton(packed: PairedCodes) -> torch.Tensor:
    """The weights [N, K'], in the type of the scales."""
    check_contiguous(words=packed.words, scales=packed.scales, zeros=packed.zeros)
    tiles, num_blocks = packed.words.shape[:2]
    out = torch.empty(packed.outputs, packed.padded_inputs, dtype=packed.scales.dtype, device=packed.words.device)
    with torch.cuda.device_of(out):
        _dequantize[(tiles, num_blocks)](
            *(packed.words, packed.scales.view(torch.int32), packed.zeros.view(torch.int32), out),
            *(packed.outputs, num_blocks, packed.scales.shape[1]),
            GROUP=packed.group,
        )
    return out
