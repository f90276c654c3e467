"""Triton kernels of the cache in eight bits: `store_kv`, and `paged_attention` for prefill chunks and decode steps alike.

Codes become numbers in registers. E4M3 is read from its bits where the device has no such type (below compute capability
8.9), and always written by its bits; scales are read and written as the bits of bfloat16. A program of the attention
takes up to 16 rows, which are the query heads of one KV head for one or several tokens, and goes over the context in tiles.
Shapes: as in paged_attention.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlserve.kernels.kv_codes import LARGEST, TINY, QuantizedBlocks
from vlserve.kernels.paged_attention import AttentionMetadata

ROWS = 16  # the least that tl.dot multiplies
TILE = 32  # positions
NATIVE_E4M3 = (8, 9)  # compute capability


def store_kv_triton(
    key: torch.Tensor, value: torch.Tensor, key_cache: QuantizedBlocks, value_cache: QuantizedBlocks, slots: torch.Tensor
) -> None:
    """As `store_kv_ref` with quotients in float32."""
    num_tokens, heads, dim = key.shape
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    tensors = [t for cache in (key_cache, value_cache) for t in (cache.codes, cache.scales.view(torch.int16))]
    with torch.cuda.device_of(key):
        _store_kernel[(num_tokens, heads)](
            *(key, value, *tensors, slots),
            *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
            HEADS=heads,
            DIM=dim,
            DIM_PADDED=triton.next_power_of_2(dim),
            LARGEST=LARGEST[key_cache.codes.dtype],
            TINY=TINY,
            IS_E4M3=key_cache.codes.dtype is torch.uint8,
        )


def paged_attention_triton(
    query: torch.Tensor, key_cache: QuantizedBlocks, value_cache: QuantizedBlocks, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """As `paged_attention_ref`: scores and sums in float32, products of the computation type."""
    query = query.contiguous()
    out = torch.empty_like(query)
    heads, dim = query.shape[1:]
    kv_heads = key_cache.shape[2]
    group = triton.next_power_of_2(heads // kv_heads)
    tokens = max(1, ROWS // group)
    is_e4m3 = key_cache.codes.dtype is torch.uint8
    tensors = [t for cache in (key_cache, value_cache) for t in (cache.codes, cache.scales.view(torch.int16))]
    tables = metadata.block_tables
    with torch.cuda.device_of(query):
        _attention_kernel[(triton.cdiv(max(metadata.query_lens), tokens), kv_heads, len(tables))](
            *(out, query, *tensors, tables, metadata.lengths, scale, tables.stride(0)),
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            GROUP_PADDED=group,
            DIM=dim,
            DIM_PADDED=max(16, triton.next_power_of_2(dim)),
            BLOCK_SIZE=key_cache.shape[1],
            TOKENS=tokens,
            TILE=TILE,
            IS_E4M3=is_e4m3,
            IS_NATIVE=is_e4m3 and query.is_cuda and torch.cuda.get_device_capability(query.device) >= NATIVE_E4M3,
        )
    return out


@triton.jit
def _numbers(codes, IS_E4M3: tl.constexpr, IS_NATIVE: tl.constexpr):
    """Codes -> float32, without their scale."""
    if not IS_E4M3:
        return codes.to(tl.float32)
    if IS_NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    bits = codes.to(tl.uint16)  # exponent and mantissa at their places in float16 are the number over 256
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _scale_of_bits(bits):
    """bfloat16 as int16 -> float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _bits_of_scale(scale):
    """float32 of 0 or more -> bfloat16 as int16, rounded to nearest, ties to even; NaN stays one."""
    bits = scale.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(scale == scale, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _e4m3_bits(x):
    """float32 within +-464 -> E4M3 as uint8, rounded to nearest, ties to even."""
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 960: the exponents' biases, 127 and 7, apart by 120
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # near 2^14 float32 has the steps of 2^-9
    code = tl.where(size < 0.015625, subnormal, normal)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _store_one(
    x, codes, scales, place, d, mask,
    DIM: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr, IS_E4M3: tl.constexpr,
):  # fmt: skip
    """One head of one token: x [DIM_PADDED] float32 to its codes and scale at `place`."""
    is_broken = tl.max((x != x).to(tl.int32), 0) > 0
    bits = _bits_of_scale(tl.where(is_broken, float("nan"), tl.div_rn(tl.max(tl.abs(x), 0), LARGEST)))
    scale = _scale_of_bits(bits)
    is_zero = scale < TINY
    tl.store(scales + place, tl.where(is_zero, 0, bits).to(tl.int16))
    quotients = tl.div_rn(x, tl.where(is_zero, 1.0, scale) + tl.zeros_like(x))
    if IS_E4M3:
        tl.store(codes + place * DIM + d, _e4m3_bits(quotients), mask=mask)
    else:  # near 1.5 * 2^23 float32 has whole numbers
        rounded = (quotients + 12582912.0) - 12582912.0
        tl.store(codes + place * DIM + d, tl.where(rounded == rounded, rounded, 0.0).to(tl.int8), mask=mask)


@triton.jit
def _store_kernel(
    key, value, key_codes, key_scales, value_codes, value_scales, slots,
    key_token, key_head, value_token, value_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    LARGEST: tl.constexpr, TINY: tl.constexpr, IS_E4M3: tl.constexpr,
):  # fmt: skip
    """One program a token and KV head."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DIM_PADDED)
    mask = d < DIM
    place = tl.load(slots + token) * HEADS + head
    k = tl.load(key + token * key_token + head * key_head + d, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(value + token * value_token + head * value_head + d, mask=mask, other=0.0).to(tl.float32)
    _store_one(k, key_codes, key_scales, place, d, mask, DIM, LARGEST, TINY, IS_E4M3)
    _store_one(v, value_codes, value_scales, place, d, mask, DIM, LARGEST, TINY, IS_E4M3)


@triton.jit
def _attention_kernel(
    out, query, key_codes, key_scales, value_codes, value_scales,
    tables, lengths, scale, table_width,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, IS_E4M3: tl.constexpr, IS_NATIVE: tl.constexpr,
):  # fmt: skip
    """One program for TOKENS query tokens of a sequence and the query heads of one KV head."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    start = tl.load(lengths + sequence * 3)
    query_len, context_len = tl.load(lengths + sequence * 3 + 1), tl.load(lengths + sequence * 3 + 2)
    first_token = tl.program_id(0) * TOKENS
    if first_token < query_len:
        row, d = tl.arange(0, TOKENS * GROUP_PADDED), tl.arange(0, DIM_PADDED)
        token, member = first_token + row // GROUP_PADDED, row % GROUP_PADDED
        is_row = ((token < query_len) & (member < GROUP))[:, None] & (d < DIM)[None, :]
        places = ((start + token) * (KV_HEADS * GROUP) + head * GROUP + member)[:, None] * DIM + d[None, :]
        q = tl.load(query + places, mask=is_row, other=0.0)
        seen = context_len - query_len + token  # the last position that the row looks at
        stop = context_len - query_len + tl.minimum(first_token + TOKENS, query_len)
        highest = tl.full((TOKENS * GROUP_PADDED,), float("-inf"), tl.float32)
        total = tl.zeros((TOKENS * GROUP_PADDED,), tl.float32)
        result = tl.zeros((TOKENS * GROUP_PADDED, DIM_PADDED), tl.float32)
        for first in range(0, stop, TILE):
            position = first + tl.arange(0, TILE)
            is_there = position < stop
            block = tl.load(tables + sequence * table_width + position // BLOCK_SIZE, mask=is_there, other=0)
            place = (block * BLOCK_SIZE + position % BLOCK_SIZE) * KV_HEADS + head
            codes_at, is_code = place[:, None] * DIM + d[None, :], is_there[:, None] & (d < DIM)[None, :]
            keys = _numbers(tl.load(key_codes + codes_at, mask=is_code, other=0), IS_E4M3, IS_NATIVE)
            key_scale = _scale_of_bits(tl.load(key_scales + place, mask=is_there, other=0)) * (scale * 1.4426950408889634)
            scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="ieee") * key_scale[None, :]
            scores = tl.where(position[None, :] <= seen[:, None], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights, shrunk = tl.exp2(scores - higher[:, None]), tl.exp2(highest - higher)
            values = _numbers(tl.load(value_codes + codes_at, mask=is_code, other=0), IS_E4M3, IS_NATIVE)
            values *= _scale_of_bits(tl.load(value_scales + place, mask=is_there, other=0))[:, None]
            total = total * shrunk + tl.sum(weights, 1)
            result *= shrunk[:, None]
            result += tl.dot(weights.to(q.dtype), values.to(q.dtype), input_precision="ieee")
            highest = higher
        tl.store(out + places, (result / total[:, None]).to(q.dtype), mask=is_row)
