"""`paged_attention` by torch's operators, in decode groups and prefills; on any device. Letters: reference.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.attention.types import AttentionMetadata, DecodeGroup, Prefill
from vlserve.kernels.kv_cache.cpu import dequantize
from vlserve.kernels.kv_cache.types import Blocks, QuantizedBlocks


def paged_attention_cpu(
    query: torch.Tensor,
    key_cache: Blocks,
    value_cache: Blocks,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `paged_attention_ref`; the checks are `paged_attention`'s.

    A decode step folds the G query heads of a KV head into the query axis before torch's attention:
    its CPU kernel works per (sequence, head) and would read each key G times otherwise.
    """
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[2]
    out = torch.empty_like(query)
    caches, dtype = (key_cache, value_cache), query.dtype
    for group in metadata.decodes:
        keys, values = (_gather(cache, group.blocks, len(group.rows), group.context_len, dtype) for cache in caches)
        first, mask = _decode_window(group, window)
        q = query[group.rows].unflatten(1, (num_kv_heads, -1))  # [B', HK, G, D]
        keys, values = keys[:, :, first:], values[:, :, first:]
        if sinks is None:
            result = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
        else:
            result = _attend_with_sinks(q, keys, values, mask, scale, sinks.view(num_kv_heads, -1))
        out[group.rows] = result.flatten(1, 2)
    for prefill in metadata.prefills:
        keys, values = (_gather(cache, prefill.blocks, 1, prefill.context_len, dtype) for cache in caches)
        first, mask = _prefill_window(prefill, window)
        q = query[prefill.start : prefill.stop].transpose(0, 1)[None]  # [1, HQ, query_len, D]
        keys, values = keys[:, :, first:], values[:, :, first:]
        if sinks is None:
            result = F.scaled_dot_product_attention(
                *(q, keys, values),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=num_heads != num_kv_heads,
            )
        else:
            keys, values = (part.repeat_interleave(num_heads // num_kv_heads, 1) for part in (keys, values))
            result = _attend_with_sinks(q, keys, values, mask, scale, sinks[:, None], is_causal=mask is None)
        out[prefill.start : prefill.stop] = result[0].transpose(0, 1)
    return out


def _attend_with_sinks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor,
    is_causal: bool = False,
) -> torch.Tensor:
    """As torch's attention; `sinks` [heads, queries or 1]. With a sink a head's weights are those without one times
    sum / (sum + e^sink), where the sum is that of its scores' powers of e."""
    added = None if mask is None else torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    result, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, is_causal=is_causal, attn_mask=added, scale=scale
    )
    return result * torch.sigmoid(log_sums - sinks).to(result.dtype)[..., None]


def _decode_window(group: DecodeGroup, window: int | None) -> tuple[int, torch.Tensor | None]:
    """(the first position that any of the sequences sees, the mask from there on)."""
    if window is None or window >= group.context_len:
        return 0, group.mask
    if group.mask is None:  # all are equally long
        return group.context_len - window, None
    lens = group.mask.sum(-1, keepdim=True)
    places = torch.arange(group.context_len, device=group.mask.device)
    first = max(0, int(lens.min()) - window)
    return first, (group.mask & (places >= lens - window))[..., first:]


def _prefill_window(prefill: Prefill, window: int | None) -> tuple[int, torch.Tensor | None]:
    """(the first position that any of the queries sees, the mask from there on)."""
    if window is None or window >= prefill.context_len:
        return 0, prefill.mask
    number = prefill.stop - prefill.start
    before = prefill.context_len - number
    first = max(0, before + 1 - window)
    mask = torch.ones(number, prefill.context_len - first, dtype=torch.bool, device=prefill.blocks.device)
    return first, mask.tril(before - first).triu(before - first + 1 - window)


def _gather(cache: Blocks, blocks: torch.Tensor, batch: int, context_len: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, S, HK, D] -> [batch, HK, L, D], a view of one copy."""
    picked = dequantize(cache, blocks, dtype) if isinstance(cache, QuantizedBlocks) else cache.index_select(0, blocks)
    picked = picked.unflatten(0, (batch, -1)).flatten(1, 2)  # [batch, M' * S, HK, D]
    return picked[:, :context_len].transpose(1, 2)


def plan_decode(group: list[tuple[int, int, int]], block_tables: torch.Tensor, block_size: int) -> DecodeGroup:
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


def plan_prefill(start: int, query_len: int, context_len: int, table: torch.Tensor, block_size: int) -> Prefill:
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
