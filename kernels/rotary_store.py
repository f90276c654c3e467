"""What comes between the projections and attention: norms of queries and keys, rotary embedding, and the cache.

Shapes: T tokens, HQ query heads and HK KV heads of this rank, D head_dim, N blocks of S slots.
"""

from __future__ import annotations

import torch

from vlserve.kernels.kv_cache import store_kv
from vlserve.kernels.kv_cache.reference import store_kv_ref
from vlserve.kernels.kv_cache.types import Blocks
from vlserve.kernels.norms import rms_norm
from vlserve.kernels.norms.reference import rms_norm_ref
from vlserve.kernels.rotary import rotary, rotary_ref
from vlserve.kernels.with_triton import runs_triton

Pair = tuple[torch.Tensor, torch.Tensor]


def rotary_store_ref(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos_sin: Pair, caches: tuple[Blocks, Blocks],
    slots: torch.Tensor, norms: Pair | None = None, eps: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """query [T, HQ, D], normed and turned, is returned; key, normed and turned, and value [T, HK, D] go to slots [T] of `caches`.

    Args:
        cos_sin: each [T, D/2] float32. caches: keys and values [N, S, HK, D]. norms: weights [D] for queries and for keys.
    """
    if norms is not None:
        query, key = rms_norm_ref(query, norms[0], eps), rms_norm_ref(key, norms[1], eps)
    store_kv_ref(rotary_ref(key, *cos_sin), value, *caches, slots)
    return rotary_ref(query, *cos_sin)


def rotary_store(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos_sin: Pair, caches: tuple[Blocks, Blocks],
    slots: torch.Tensor, norms: Pair | None = None, eps: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """As `rotary_store_ref`; raises ValueError when the shapes do not fit each other."""
    if runs_triton(query):
        from vlserve.kernels.rotary_store_triton import rotary_store_triton

        return rotary_store_triton(query, key, value, cos_sin, caches, slots, norms, eps)
    if norms is not None:
        query, key = rms_norm(query, norms[0], eps), rms_norm(key, norms[1], eps)
    query, key = rotary(query, *cos_sin), rotary(key, *cos_sin)
    store_kv(key, value, *caches, slots)
    return query
