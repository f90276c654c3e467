"""Writes new keys and values to their slots in the paged cache.

Shapes: T tokens, HK KV heads of this rank, D head_dim, N blocks of S slots.
"""

from __future__ import annotations

import torch


def store_kv_ref(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """key, value [T, HK, D] into caches [N, S, HK, D] at slots [T] (block * S + place), in place."""
    size = key_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        key_cache[slot // size, slot % size] = key[token]
        value_cache[slot // size, slot % size] = value[token]


def store_kv(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """As `store_kv_ref`; raises ValueError when key, value, cache or slots do not fit each other."""
    if key.shape != value.shape or key.shape[1:] != key_cache.shape[2:] or slots.shape != key.shape[:1]:
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)} and slots {tuple(slots.shape)} "
            f"do not fit a cache of {tuple(key_cache.shape)}"
        )
    key_cache.flatten(0, 1).index_copy_(0, slots, key)
    value_cache.flatten(0, 1).index_copy_(0, slots, value)
