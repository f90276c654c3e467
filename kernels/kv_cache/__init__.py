"""Writes new keys and values to their slots in the paged cache, as they are or in eight bits. Letters: reference.py.

There is no kernel for it alone: on a GPU `rotary_store` does it, with what triton.py has of codes.
"""

from __future__ import annotations

import torch

from vlserve.kernels.kv_cache.cpu import store_kv_cpu
from vlserve.kernels.kv_cache.types import Blocks


def store_kv(key: torch.Tensor, value: torch.Tensor, key_cache: Blocks, value_cache: Blocks, slots: torch.Tensor) -> None:
    """As `store_kv_ref`; raises ValueError when key, value, cache or slots do not fit each other."""
    if key.shape != value.shape or key.shape[1:] != key_cache.shape[2:] or slots.shape != key.shape[:1]:
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)} and slots {tuple(slots.shape)} "
            f"do not fit a cache of {tuple(key_cache.shape)}"
        )
    store_kv_cpu(key, value, key_cache, value_cache, slots)
