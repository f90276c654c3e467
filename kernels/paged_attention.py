"""Causal attention over a paged KV cache, for prefill chunks and decode steps in one call.

A sequence's last `query_len` tokens are the queries; its `context_len` counts them too. Keys and
values, the new ones included, are already in the cache; the slots past a sequence's end in its own
blocks hold finite numbers. The cache holds them as they are or in eight bits. Shapes: T query tokens of all sequences one
after another, B sequences, HQ query heads, HK KV heads, G = HQ / HK, D head_dim, N blocks of S slots,
M blocks per sequence at most, L context length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from vlserve.kernels.kv_codes import Blocks, QuantizedBlocks, dequantize, dequantize_ref
from vlserve.kernels.with_triton import runs_triton


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionMetadata:
    """Who attends to what in one step; one object serves every layer. Made by `plan_attention`."""

    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: torch.Tensor  # [B, M] int64, padded with a block of the same sequence
    slots: torch.Tensor  # [T] int64, where the new keys and values go
    decodes: tuple[DecodeGroup, ...]  # these two for torch's operators
    prefills: tuple[Prefill, ...]
    launches: dict[tuple[int, ...], Any] = field(default_factory=dict)  # for Triton's kernels, by shape; made by the first layer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeGroup:
    """Sequences with one query each and contexts of similar length, attended to together."""

    rows: torch.Tensor  # [B'] int64, their places among the T tokens
    blocks: torch.Tensor  # [B' * M'] int64
    context_len: int  # the longest
    mask: torch.Tensor | None  # [B', 1, 1, L] bool, None where all are equally long


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefill:
    """One sequence with several queries: tokens start..stop of the T."""

    start: int
    stop: int
    blocks: torch.Tensor  # [M'] int64
    context_len: int
    mask: torch.Tensor | None  # [query_len, L] bool, None where nothing came before the queries


def plan_attention(
    *,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    block_tables: torch.Tensor,
    slots: torch.Tensor,
    block_size: int,
) -> AttentionMetadata:
    """Sort the sequences of a step into decode groups and prefills, once for all layers.

    Args:
        query_lens, context_lens: tokens per sequence; raises ValueError unless 1 <= query <= context.
        block_tables: [B, M] int64. slots: [T] int64. block_size: slots in a block.
    """
    if sum(query_lens) != len(slots):
        raise ValueError(f"query_lens sum to {sum(query_lens)}, but there are {len(slots)} slots")
    decode: list[tuple[int, int, int]] = []  # (context_len, sequence, row)
    prefills = []
    is_for_torch = not runs_triton(block_tables)
    start = 0
    for i, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        if not 1 <= query_len <= context_len:
            raise ValueError(f"sequence {i} has {query_len} query tokens in a context of {context_len}")
        if query_len == 1 and is_for_torch:
            decode.append((context_len, i, start))
        elif is_for_torch:
            prefills.append(_plan_prefill(start, query_len, context_len, block_tables[i], block_size))
        start += query_len
    groups: list[list[tuple[int, int, int]]] = []
    for entry in sorted(decode):
        if groups and entry[0] <= 2 * groups[-1][0][0]:  # padding costs at most as much as the work
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return AttentionMetadata(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=block_tables,
        slots=slots,
        decodes=tuple(_plan_decode(group, block_tables, block_size) for group in groups),
        prefills=tuple(prefills),
    )


def paged_attention_ref(
    query: torch.Tensor, key_cache: Blocks, value_cache: Blocks, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """query [T, HQ, D], caches [N, S, HK, D] -> [T, HQ, D], sequence by sequence; in float32, or float64 where query is."""
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
        future = torch.arange(context_len, device=query.device)[None] > last[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        out[start : start + query_len] = torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)
        start += query_len
    return out


def paged_attention(
    query: torch.Tensor, key_cache: Blocks, value_cache: Blocks, metadata: AttentionMetadata, scale: float
) -> torch.Tensor:
    """As `paged_attention_ref`; raises ValueError when the query heads are no multiple of the KV heads.

    A decode step folds the G query heads of a KV head into the query axis before torch's attention:
    its CPU kernel works per (sequence, head) and would read each key G times otherwise.
    """
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    if runs_triton(query):
        from vlserve.kernels.paged_attention_triton import paged_attention_triton

        return paged_attention_triton(query, key_cache, value_cache, metadata, scale)
    out = torch.empty_like(query)
    caches, dtype = (key_cache, value_cache), query.dtype
    for group in metadata.decodes:
        keys, values = (_gather(cache, group.blocks, len(group.rows), group.context_len, dtype) for cache in caches)
        q = query[group.rows].unflatten(1, (num_kv_heads, -1))  # [B', HK, G, D]
        result = F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask, scale=scale)
        out[group.rows] = result.flatten(1, 2)
    for prefill in metadata.prefills:
        keys, values = (_gather(cache, prefill.blocks, 1, prefill.context_len, dtype) for cache in caches)
        q = query[prefill.start : prefill.stop].transpose(0, 1)[None]  # [1, HQ, query_len, D]
        result = F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            scale=scale,
            enable_gqa=num_heads != num_kv_heads,
        )
        out[prefill.start : prefill.stop] = result[0].transpose(0, 1)
    return out


def _gather(cache: Blocks, blocks: torch.Tensor, batch: int, context_len: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, S, HK, D] -> [batch, HK, L, D], a view of one copy."""
    picked = dequantize(cache, blocks, dtype) if isinstance(cache, QuantizedBlocks) else cache.index_select(0, blocks)
    picked = picked.unflatten(0, (batch, -1)).flatten(1, 2)  # [batch, M' * S, HK, D]
    return picked[:, :context_len].transpose(1, 2)


def _plan_decode(group: list[tuple[int, int, int]], block_tables: torch.Tensor, block_size: int) -> DecodeGroup:
    longest, shortest = group[-1][0], group[0][0]
    device = block_tables.device
    sequences = torch.tensor([sequence for _, sequence, _ in group], device=device)
    mask = None
    if longest != shortest:
        lens = torch.tensor([context_len for context_len, _, _ in group], device=device)
        mask = (torch.arange(longest, device=device)[None] < lens[:, None])[:, None, None]
    return DecodeGroup(
        rows=torch.tensor([row for _, _, row in group], device=device),
        blocks=block_tables[sequences, : -(-longest // block_size)].flatten(),
        context_len=longest,
        mask=mask,
    )


def _plan_prefill(start: int, query_len: int, context_len: int, table: torch.Tensor, block_size: int) -> Prefill:
    mask = None
    if query_len != context_len:
        mask = torch.ones(query_len, context_len, dtype=torch.bool, device=table.device).tril(context_len - query_len)
    return Prefill(
        start=start,
        stop=start + query_len,
        blocks=table[: -(-context_len // block_size)],
        context_len=context_len,
        mask=mask,
    )
