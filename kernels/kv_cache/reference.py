"""What the cache holds of new keys and values, number by number: as they are, or codes and scales as in types.py.

Shapes: T tokens, HK KV heads of this rank, D head_dim, N blocks of S slots.
"""

from __future__ import annotations

import torch

from vlserve.kernels.kv_cache.types import LARGEST, SCALE_TYPE, TINY, Blocks, QuantizedBlocks


def quantize_ref(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] -> codes [..., D] of type `kind`, scales [...]; the quotients in float64."""
    scales = (x.abs().amax(-1).float() / LARGEST[kind]).to(SCALE_TYPE)
    scales = torch.where(scales < TINY, 0, scales)
    quotients = x.double() / torch.where(scales == 0, 1, scales).double()[..., None]
    if kind is torch.int8:
        return quotients.round().to(torch.int8), scales
    exponents = quotients.abs().clamp_min(2.0**-6).log2().floor()  # below 2^-6 E4M3 is subnormal: even steps
    steps = torch.exp2(exponents - 3)  # three bits of mantissa
    return ((quotients / steps).round() * steps).to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantize_ref(blocks: QuantizedBlocks, dtype: torch.dtype) -> torch.Tensor:
    """Every block as numbers [N, S, HK, D] of `dtype`."""
    codes = blocks.codes.view(torch.float8_e4m3fn) if blocks.codes.dtype is torch.uint8 else blocks.codes
    return codes.to(dtype) * blocks.scales.to(dtype)[..., None]


def store_kv_ref(key: torch.Tensor, value: torch.Tensor, key_cache: Blocks, value_cache: Blocks, slots: torch.Tensor) -> None:
    """key, value [T, HK, D] into caches [N, S, HK, D] at slots [T] (block * S + place), in place."""
    size = key_cache.shape[1]
    for new, cache in ((key, key_cache), (value, value_cache)):
        for token, slot in enumerate(slots.tolist()):
            if isinstance(cache, QuantizedBlocks):
                codes, scales = quantize_ref(new[token], cache.codes.dtype)
                cache.codes[slot // size, slot % size] = codes
                cache.scales[slot // size, slot % size] = scales
            else:
                cache[slot // size, slot % size] = new[token]
