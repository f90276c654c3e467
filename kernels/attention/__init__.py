"""Attention over the paged cache: a step is planned once, then computed layer by layer where it runs. Letters: reference.py."""

from __future__ import annotations

import torch

from vlserve.kernels.attention.cpu import paged_attention_cpu, plan_decode, plan_prefill
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache.types import Blocks
from vlserve.kernels.with_triton import runs_triton


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
            prefills.append(plan_prefill(start, query_len, context_len, block_tables[i], block_size))
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
        block_size=block_size,
        decodes=tuple(plan_decode(group, block_tables, block_size) for group in groups),
        prefills=tuple(prefills),
    )


def paged_attention(
    query: torch.Tensor,
    key_cache: Blocks,
    value_cache: Blocks,
    metadata: AttentionMetadata,
    scale: float,
    *,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_attention_ref`; raises ValueError when the query heads are no multiple of the KV heads, and for no window."""
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of {num_kv_heads} KV heads")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens; expected 1 or more, or None for the whole context")
    if runs_triton(query):
        from vlserve.kernels.attention.triton import paged_attention_triton

        return paged_attention_triton(query, key_cache, value_cache, metadata, scale, window=window, sinks=sinks)
    return paged_attention_cpu(query, key_cache, value_cache, metadata, scale, window, sinks)
