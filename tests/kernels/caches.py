"""Paged caches for tests: numbers as they are or codes, with NaN where nobody has written."""

from __future__ import annotations

import pytest
import torch

from vlserve.kernels.attention import plan_attention
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache import store_kv
from vlserve.kernels.kv_cache.types import Blocks, QuantizedBlocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [pytest.param(torch.int8, id="int8"), pytest.param(torch.uint8, id="fp8")]
SIZES = torch.tensor(
    [1, 1e-3, 300, 0, 6e4, 1e-7, 3, 1]
)  # of a token's numbers; 0 is a token of zeros  # of a token's numbers; 0 is a token of zeros


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, kind: torch.dtype | None) -> Blocks:
    if kind is None:
        return torch.full(shape, float("nan"), dtype=dtype)
    return QuantizedBlocks(torch.full(shape, 0x7F, dtype=kind), torch.full(shape[:-1], float("nan"), dtype=torch.bfloat16))


def tensors(blocks: Blocks) -> tuple[torch.Tensor, ...]:
    return (blocks.codes, blocks.scales) if isinstance(blocks, QuantizedBlocks) else (blocks,)


def moved(blocks: Blocks) -> Blocks:
    there = [tensor.to(DEVICE) for tensor in tensors(blocks)]
    return QuantizedBlocks(*there) if isinstance(blocks, QuantizedBlocks) else there[0]


def awkward(heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A token of each size, one with an outlier a thousand times the rest."""
    x = torch.randn(len(SIZES), heads, dim).clamp(-1, 1) * SIZES[:, None, None]
    x[6, 0, 0] = 3000
    return x.to(dtype)


def paged(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    size: int,
    dtype: torch.dtype,
    kind: torch.dtype | None = None,
) -> tuple[torch.Tensor, Blocks, Blocks, AttentionMetadata, list[tuple[torch.Tensor, ...]]]:
    """A cache (of codes where there is a `kind`) with scattered blocks, those of nobody full of NaN, and the contiguous
    tensors behind it."""
    counts = [-(-n // size) for n in context_lens]
    num_blocks = sum(counts) + 3
    order = torch.randperm(num_blocks).tolist()
    keys, values = (poisoned((num_blocks, size, kv_heads, dim), dtype, kind) for _ in range(2))
    tables, slots, plain, queries = [], [], [], []
    for query_len, context_len, count in zip(query_lens, context_lens, counts, strict=True):
        blocks, order = order[:count], order[count:]
        k, v, q = (
            torch.randn(n, h, dim).to(dtype) for n, h in ((context_len, kv_heads), (context_len, kv_heads), (query_len, heads))
        )
        places = torch.tensor([blocks[p // size] * size + p % size for p in range(context_len)])
        for tensor in (*tensors(keys), *tensors(values)):
            tensor[blocks] = 0
        store_kv(k, v, keys, values, places)
        slots += places[context_len - query_len :].tolist()
        tables.append(blocks + blocks[-1:] * (max(counts) - count))
        plain.append((q, k, v))
        queries.append(q)
    metadata = plan_attention(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=torch.tensor(tables),
        slots=torch.tensor(slots),
        block_size=size,
    )
    return torch.cat(queries), keys, values, metadata, plain
