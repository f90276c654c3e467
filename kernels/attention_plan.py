"""What a step's attention launches on a GPU: planned once, for all layers, from lengths that the host knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlserve.kernels.attention_launch import Tiling, choose_chunk, choose_tiling, looked_at, make_schedule
from vlserve.kernels.kv_codes import Blocks, QuantizedBlocks
from vlserve.kernels.paged_attention import AttentionMetadata

INTERPRETERS = 8, 80  # multiprocessors and compute capability, for tensors that are on no GPU


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Launch:
    """Either the decodes or the prefills of a step."""

    tiling: Tiling
    schedule: torch.Tensor  # [5 * sequences + items + merges] int32, as in `attention_launch.Schedule`
    tables: torch.Tensor  # [B, M] int32
    num_sequences: int
    num_items: int
    num_merges: int
    chunk: int  # tiles


def plan_launches(metadata: AttentionMetadata, query: torch.Tensor, cache: Blocks, num_sms: int | None = None) -> list[Launch]:
    """Those of `metadata`, made when it is first asked for this shape; `num_sms` multiprocessors, the device's by default."""
    stored = cache.codes if isinstance(cache, QuantizedBlocks) else cache
    key = (query.shape[1], *stored.shape[2:], query.itemsize, stored.itemsize, num_sms or 0)
    if key not in metadata.launches:
        metadata.launches[key] = _plan(metadata, query, stored, num_sms)
    return metadata.launches[key]


def _plan(metadata: AttentionMetadata, query: torch.Tensor, stored: torch.Tensor, num_sms: int | None) -> list[Launch]:
    heads, (kv_heads, dim) = query.shape[1], stored.shape[2:]
    sms, arch = _device(query.device)
    itemsize = 4 if query.dtype is torch.float32 else stored.itemsize
    decodes: list[tuple[int, int, int, int]] = []
    prefills: list[tuple[int, int, int, int]] = []
    start = 0
    for i, (query_len, context_len) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
        (decodes if query_len == 1 else prefills).append((i, start, query_len, context_len))
        start += query_len
    tables, launches = metadata.block_tables.to(torch.int32).contiguous(), []
    for sequences in filter(None, (decodes, prefills)):
        longest = max(query_len for _, _, query_len, _ in sequences)
        tiling = choose_tiling(longest, heads // kv_heads, dim, itemsize, arch)
        lengths = [stop for *_, query_len, length in sequences for stop in looked_at(query_len, length, tiling.tokens)]
        tile_bytes = 2 * tiling.positions * dim * stored.itemsize
        chunk = choose_chunk(lengths, kv_heads, tile=tiling.positions, tile_bytes=tile_bytes, num_sms=num_sms or sms)
        schedule = make_schedule(sequences, tokens=tiling.tokens, chunk=chunk * tiling.positions)
        numbers = [number for sequence in schedule.sequences for number in sequence] + schedule.items + schedule.merges
        launches.append(
            Launch(
                tiling=tiling,
                schedule=torch.tensor(numbers, dtype=torch.int32, device=tables.device),
                tables=tables,
                num_sequences=len(sequences),
                num_items=len(schedule.items),
                num_merges=len(schedule.merges),
                chunk=chunk,
            )
        )
    return launches


def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and compute capability, 80 for 8.0."""
    if device.type != "cuda":
        return INTERPRETERS
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor
