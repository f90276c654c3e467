"""Causal attention over a paged KV cache, for prefill chunks and decode steps in one call.

A sequence's last `query_len` tokens are the queries; its `context_len` counts them too. Keys and
values, the new ones included, are already in the cache; the slots past a sequence's end in its own
blocks hold finite numbers. The cache holds them as they are or in eight bits. Shapes: T query tokens of all sequences one
after another, B sequences, HQ query heads, HK KV heads, G = HQ / HK, D head_dim, N blocks of S slots,
M blocks per sequence at most, L context length.
"""

from __future__ import annotations

import torch

from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache.reference import dequantize_ref
from vlserve.kernels.kv_cache.types import Blocks, QuantizedBlocks


def paged_attention_ref(
    query: torch.Tensor,
    key_cache: Blocks,
    value_cache: Blocks,
    metadata: AttentionMetadata,
    scale: float,
    *,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [T, HQ, D], caches [N, S, HK, D] -> [T, HQ, D], sequence by sequence; in float32, or float64 where query is.

    Args:
        window: tokens that a token sees, itself counted; None for all before it.
        sinks: [HQ] float32, a score a head that every token has beside its context's and that has no value, so that weights
            sum to less than one; None for none. Source: GPT-OSS (arXiv 2508.10925), after arXiv 2309.17453.
    """
    out = torch.empty_like(query)
    dtype = torch.promote_types(query.dtype, torch.float32)
    key_cache, value_cache = (
        dequantize_ref(cache, dtype) if isinstance(cache, QuantizedBlocks) else cache.to(dtype)
        for cache in (key_cache, value_cache)
    )
    group = query.shape[1] // key_cache.shape[2]
    start = 0
    for i, (query_len, context_len) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
        table = metadata.block_tables[i]
        keys = key_cache[table].flatten(0, 1)[:context_len].repeat_interleave(group, dim=1)  # [L, HQ, D]
        values = value_cache[table].flatten(0, 1)[:context_len].repeat_interleave(group, dim=1)
        q = query[start : start + query_len].to(dtype)
        scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
        last = torch.arange(context_len - query_len, context_len, device=query.device)
        places = torch.arange(context_len, device=query.device)[None]
        is_seen = (places <= last[:, None]) & (places > last[:, None] - (window or context_len))
        scores = scores.masked_fill(~is_seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat((sinks.to(dtype)[:, None, None].expand(-1, query_len, 1), scores), dim=-1)
        weights = scores.softmax(dim=-1)[..., -context_len:]
        out[start : start + query_len] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
        start += query_len
    return out
