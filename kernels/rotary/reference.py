"""Rotary position embedding, half-rotated as in GPT-NeoX, and all that comes between the projections and attention: norms of
queries and keys, the embedding, and the cache.

Source: Su et al. 2021 (arXiv 2104.09864). Shapes: T tokens, H heads, of which HQ query heads and HK KV heads of this rank, D
head_dim, N blocks of S slots.
"""

from __future__ import annotations

import torch

from vlserve.kernels.kv_cache.reference import store_kv_ref
from vlserve.kernels.kv_cache.types import Blocks
from vlserve.kernels.norms.reference import rms_norm_ref

Pair = tuple[torch.Tensor, torch.Tensor]


def rotary_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn channel i with channel i + D/2; x [T, H, D], cos and sin [T, D/2] -> [T, H, D]."""
    first, second = x.float().chunk(2, dim=-1)
    c, s = cos.float()[:, None], sin.float()[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)


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
