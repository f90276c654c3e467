"""`rotary_store` on a GPU: a program for a token's queries, one for its keys, one for its values; all in float32.

Halves of a head are apart, since rotary embedding turns channel i with channel i + D/2. Shapes: as in reference.py;
H heads of a kind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vlserve.kernels.kv_cache.triton import bits_of_number, e4m3_of_number, number_of_bits
from vlserve.kernels.kv_cache.types import LARGEST, TINY, Blocks, QuantizedBlocks
from vlserve.kernels.rotary.reference import Pair
from vlserve.kernels.with_triton import check_contiguous


def rotary_store_triton(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos_sin: Pair, caches: tuple[Blocks, Blocks],
    slots: torch.Tensor, norms: Pair | None = None, eps: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """As `rotary_store_ref`; raises ValueError when the shapes do not fit each other, or caches or slots lie in pieces."""
    _check(query, key, value, cos_sin, caches, slots)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in cos_sin)
    (num_tokens, heads, dim), kv_heads = query.shape, key.shape[1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    is_coded = isinstance(caches[0], QuantizedBlocks)
    stored = [(c.codes, c.scales.view(torch.int16)) if isinstance(c, QuantizedBlocks) else (c, None) for c in caches]
    kind = stored[0][0].dtype
    check_contiguous(keys=stored[0][0], key_scales=stored[0][1], values=stored[1][0], value_scales=stored[1][1], slots=slots)
    if norms is not None:
        check_contiguous(q_norm=norms[0], k_norm=norms[1])
    with torch.cuda.device_of(query):
        _kernel[(num_tokens, 3)](
            *(out, query, key, value, cos, sin, *(norms or (None, None)), *stored[0], *stored[1], slots),
            *(x.stride(axis) for x in (query, key, value) for axis in (0, 1)),
            *(cos.stride(0), sin.stride(0), eps),
            HEADS=heads,
            HEADS_PADDED=triton.next_power_of_2(heads),
            KV_HEADS=kv_heads,
            KV_HEADS_PADDED=triton.next_power_of_2(kv_heads),
            HALF=dim // 2,
            HALF_PADDED=triton.next_power_of_2(dim // 2),
            HAS_NORMS=norms is not None,
            IS_CODED=is_coded,
            IS_E4M3=kind is torch.uint8,
            LARGEST=LARGEST.get(kind, 1.0),
            TINY=TINY,
        )
    return out


def _check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos_sin: Pair, caches: tuple[Blocks, Blocks], slots: torch.Tensor
) -> None:
    num_tokens, _, dim = query.shape
    fits = key.shape == value.shape == (num_tokens, *caches[0].shape[2:]) and caches[0].shape == caches[1].shape
    fits = fits and key.shape[-1] == dim and slots.shape == (num_tokens,)
    if not fits or any(x.shape != (num_tokens, dim // 2) for x in cos_sin):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, cos {tuple(cos_sin[0].shape)} "
            f"and slots {tuple(slots.shape)} do not fit each other and a cache of {tuple(caches[0].shape)}"
        )


@triton.jit
def _load_halves(x, token, token_stride, head_stride, h, d, mask, HALF: tl.constexpr):
    pointers = x + token * token_stride + h[:, None] * head_stride + d[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _norm_and_turn(
    first, second, weight, cos, sin, token, cos_stride, sin_stride, d, eps,
    HALF: tl.constexpr, HAS_NORMS: tl.constexpr,
):  # fmt: skip
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
        first *= scale * tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        second *= scale * tl.load(weight + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos + token * cos_stride + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * sin_stride + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    return first * c - second * s, second * c + first * s


@triton.jit
def _codes(x, scale, IS_E4M3: tl.constexpr):
    quotients = tl.div_rn(x, scale + tl.zeros_like(x))
    if IS_E4M3:
        return e4m3_of_number(quotients)
    else:  # near 1.5 * 2^23 float32 has whole numbers
        rounded = (quotients + 12582912.0) - 12582912.0
        return tl.where(rounded == rounded, rounded, 0.0).to(tl.int8)


@triton.jit
def _store_halves(
    cache, scales, first, second, slot, h, d, mask,
    HEADS: tl.constexpr, HALF: tl.constexpr, IS_CODED: tl.constexpr, IS_E4M3: tl.constexpr,
    LARGEST: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """[H, HALF] twice, float32, to all heads of a slot."""
    places = slot * HEADS + h
    pointers = cache + places[:, None] * (2 * HALF) + d[None, :]
    if IS_CODED:
        is_broken = tl.max(((first != first) | (second != second)).to(tl.int32), 1) > 0
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        bits = bits_of_number(tl.where(is_broken, float("nan"), tl.div_rn(largest, LARGEST + tl.zeros_like(largest))))
        scale = number_of_bits(bits)
        is_zero = scale < TINY
        tl.store(scales + places, tl.where(is_zero, 0, bits).to(tl.int16), mask=h < HEADS)
        divisor = tl.where(is_zero, 1.0, scale)[:, None]
        tl.store(pointers, _codes(first, divisor, IS_E4M3), mask=mask)
        tl.store(pointers + HALF, _codes(second, divisor, IS_E4M3), mask=mask)
    else:
        tl.store(pointers, first.to(cache.dtype.element_ty), mask=mask)
        tl.store(pointers + HALF, second.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    out, query, key, value, cos, sin, q_norm, k_norm, key_cache, key_scales, value_cache, value_scales, slots,
    query_token, query_head, key_token, key_head, value_token, value_head, cos_stride, sin_stride, eps,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, KV_HEADS: tl.constexpr, KV_HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, HAS_NORMS: tl.constexpr,
    IS_CODED: tl.constexpr, IS_E4M3: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    token, kind, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, HALF_PADDED)
    if kind == 0:  # names of its own: Triton wants one shape for a name in both branches
        q_h = tl.arange(0, HEADS_PADDED)
        q_mask = (q_h < HEADS)[:, None] & (d < HALF)[None, :]
        q_first, q_second = _load_halves(query, token, query_token, query_head, q_h, d, q_mask, HALF)
        q_first, q_second = _norm_and_turn(
            q_first, q_second, q_norm, cos, sin, token, cos_stride, sin_stride, d, eps, HALF, HAS_NORMS
        )  # fmt: skip
        pointers = out + (token * HEADS + q_h)[:, None] * (2 * HALF) + d[None, :]
        tl.store(pointers, q_first.to(out.dtype.element_ty), mask=q_mask)
        tl.store(pointers + HALF, q_second.to(out.dtype.element_ty), mask=q_mask)
    else:
        h = tl.arange(0, KV_HEADS_PADDED)
        mask = (h < KV_HEADS)[:, None] & (d < HALF)[None, :]
        slot = tl.load(slots + token)
        if kind == 1:
            first, second = _load_halves(key, token, key_token, key_head, h, d, mask, HALF)
            first, second = _norm_and_turn(
                first, second, k_norm, cos, sin, token, cos_stride, sin_stride, d, eps, HALF, HAS_NORMS
            )  # fmt: skip
            _store_halves(
                key_cache, key_scales, first, second, slot, h, d, mask,
                KV_HEADS, HALF, IS_CODED, IS_E4M3, LARGEST, TINY,
            )  # fmt: skip
        else:
            first, second = _load_halves(value, token, value_token, value_head, h, d, mask, HALF)
            _store_halves(
                value_cache, value_scales, first, second, slot, h, d, mask,
                KV_HEADS, HALF, IS_CODED, IS_E4M3, LARGEST, TINY,
            )  # fmt: skip
