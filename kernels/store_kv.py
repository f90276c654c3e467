"""Writes new keys and values to their slots in the paged cache, as they are or in eight bits.

Shapes: T tokens, HK KV heads of this rank, D head_dim, N blocks of S slots.
"""

from __future__ import annotations

import torch

from vlserve.kernels.kv_codes import Blocks, QuantizedBlocks, quantize, quantize_ref


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


def store_kv(key: torch.Tensor, value: torch.Tensor, key_cache: Blocks, value_cache: Blocks, slots: torch.Tensor) -> None:
    """As `store_kv_ref`; raises ValueError when key, value, cache or slots do not fit each other."""
    if key.shape != value.shape or key.shape[1:] != key_cache.shape[2:] or slots.shape != key.shape[:1]:
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)} and slots {tuple(slots.shape)} "
            f"do not fit a cache of {tuple(key_cache.shape)}"
        )
    if isinstance(key_cache, torch.Tensor) and isinstance(value_cache, torch.Tensor):
        key_cache.flatten(0, 1).index_copy_(0, slots, key)
        value_cache.flatten(0, 1).index_copy_(0, slots, value)
        return
    assert isinstance(key_cache, QuantizedBlocks) and isinstance(value_cache, QuantizedBlocks), "a layer has one kind of blocks"
    numbers = torch.stack((key, value)).float()  # a decode step is a few tokens: half the operators, half the time
    for cache, codes, scales in zip((key_cache, value_cache), *quantize(numbers, key_cache.codes.dtype), strict=True):
        cache.codes.flatten(0, 1).index_copy_(0, slots, codes)
        cache.scales.flatten(0, 1).index_copy_(0, slots, scales)
