"""Codes and scales, made and read by torch's operators, which any device has. Letters: types.py."""

from __future__ import annotations

import torch

from vlserve.kernels.kv_cache.types import LARGEST, SCALE_TYPE, TINY, Blocks, QuantizedBlocks

AT_ONCE = 2**17  # numbers: what is between codes and result stays in the processor's cache


def quantize(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_ref`, with quotients in float32."""
    x = x.float()
    scales = (x.abs().amax(-1) / LARGEST[kind]).to(SCALE_TYPE)
    scales.masked_fill_(scales < TINY, 0)
    quotients = x / scales.masked_fill(scales == 0, 1).float()[..., None]  # at most 127.25 and 448.9: no clamping
    if kind is torch.int8:
        return quotients.round_().to(torch.int8), scales
    return quotients.to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantize(blocks: QuantizedBlocks, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The blocks `index` [n] as numbers [n, S, HK, D] of `dtype`, each rounded once."""
    out = torch.empty((len(index), *blocks.shape[1:]), dtype=dtype, device=index.device)
    step = max(1, AT_ONCE // blocks.shape[1:].numel())
    for part, target in zip(index.split(step), out.split(step), strict=True):
        scales = blocks.scales.index_select(0, part).float()[..., None]
        if blocks.codes.dtype is torch.int8:
            target.copy_(blocks.codes.index_select(0, part).float().mul_(scales))
        else:
            target.copy_(_float_of_e4m3(blocks.codes.index_select(0, part)).mul_(scales))
    return out


def store_kv_cpu(key: torch.Tensor, value: torch.Tensor, key_cache: Blocks, value_cache: Blocks, slots: torch.Tensor) -> None:
    """As `store_kv_ref`; the checks are `store_kv`'s."""
    if isinstance(key_cache, torch.Tensor) and isinstance(value_cache, torch.Tensor):
        key_cache.flatten(0, 1).index_copy_(0, slots, key)
        value_cache.flatten(0, 1).index_copy_(0, slots, value)
        return
    assert isinstance(key_cache, QuantizedBlocks) and isinstance(value_cache, QuantizedBlocks), "a layer has one kind of blocks"
    numbers = torch.stack((key, value)).float()  # a decode step is a few tokens: half the operators, half the time
    for cache, codes, scales in zip((key_cache, value_cache), *quantize(numbers, key_cache.codes.dtype), strict=True):
        cache.codes.flatten(0, 1).index_copy_(0, slots, codes)
        cache.scales.flatten(0, 1).index_copy_(0, slots, scales)


def _float_of_e4m3(bits: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32: exponent and mantissa at their places in float16 are the number over 256. torch's own conversion
    on the CPU goes number by number and takes fifty times as long."""
    halves = bits.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(-0x4001).view(torch.float16)
    return halves.float().mul_(256)
