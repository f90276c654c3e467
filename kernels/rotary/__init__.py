"""Turns queries and keys by their positions, and stores keys and values: in one kernel on a GPU. Letters: reference.py."""

from __future__ import annotations

import torch

from vlserve.kernels.kv_cache import store_kv
from vlserve.kernels.kv_cache.types import Blocks
from vlserve.kernels.norms import rms_norm
from vlserve.kernels.rotary.reference import Pair
from vlserve.kernels.with_triton import runs_triton


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `rotary_ref`, in x's dtype (transformers rounds cos and sin to it); raises ValueError on wrong shapes."""
    if cos.shape != (x.shape[0], x.shape[-1] // 2) or sin.shape != cos.shape:
        raise ValueError(f"x is {tuple(x.shape)}, but cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; expected [T, D/2]")
    first, second = x.chunk(2, dim=-1)
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def rotary_store(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos_sin: Pair, caches: tuple[Blocks, Blocks],
    slots: torch.Tensor, norms: Pair | None = None, eps: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """As `rotary_store_ref`; raises ValueError when the shapes do not fit each other."""
    if runs_triton(query):
        from vlserve.kernels.rotary.triton import rotary_store_triton

        return rotary_store_triton(query, key, value, cos_sin, caches, slots, norms, eps)
    if norms is not None:
        query, key = rms_norm(query, norms[0], eps), rms_norm(key, norms[1], eps)
    query, key = rotary(query, *cos_sin), rotary(key, *cos_sin)
    store_kv(key, value, *caches, slots)
    return query
