"""What a step's attention launches on a GPU: planned once, for all layers, from lengths that the host knows.

A launch has a schedule of its own size, or, for decode steps that are replayed, one of a fixed size with a fixed grid, which
is written anew for each step (`FixedDecodes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlserve.kernels.attention.launch import MOST_PROGRAMS, Tiling, choose_chunk, choose_tiling, looked_at, make_schedule
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache.types import Blocks, QuantizedBlocks
from vlserve.kernels.upload import upload

INTERPRETERS = 8, 80  # multiprocessors and compute capability, for tensors that are on no GPU
REPLAYED_PROGRAMS = 4  # a multiprocessor, at most, in a grid of fixed size: those without work are launched as well
IDLE = -1

Key = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Launch:
    """Either the decodes or the prefills of a step."""

    tiling: Tiling
    # [5 * sequences + items + merges + 1] int32: as in `launch.Schedule`, then the tiles of a chunk
    schedule: torch.Tensor
    tables: torch.Tensor  # [B, M] int32
    num_sequences: int
    num_items: int
    num_merges: int

    @property
    def chunk_at(self) -> int:
        """Place of the chunk's tiles."""
        return len(self.schedule) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides how attention is cut; `itemsize` and `stored_itemsize` are bytes of a query's and of a cache's number."""

    heads: int
    kv_heads: int
    dim: int
    itemsize: int
    stored_itemsize: int
    num_sms: int
    arch: int
    key: Key

    def tiling(self, longest_query: int) -> Tiling:
        itemsize = 4 if self.itemsize == 4 else self.stored_itemsize
        return choose_tiling(longest_query, self.heads // self.kv_heads, self.dim, itemsize, self.arch)

    def chunk(self, sequences: Sequence[tuple[int, int, int, int]], tiling: Tiling, most_programs: int) -> int:
        """Tiles, for sequences as in `make_schedule`."""
        lengths = [stop for *_, query_len, length in sequences for stop in looked_at(query_len, length, tiling.tokens)]
        tile_bytes = 2 * tiling.positions * self.dim * self.stored_itemsize
        return choose_chunk(
            *(lengths, self.kv_heads),
            tile=tiling.positions,
            tile_bytes=tile_bytes,
            num_sms=self.num_sms,
            longest_first=any(query_len > 1 for _, _, query_len, _ in sequences),
            most_programs=most_programs,
        )


def read_shape(heads: int, dtype: torch.dtype, device: torch.device, cache: Blocks, num_sms: int | None = None) -> Shape:
    """Of queries with so many heads; `num_sms` multiprocessors, the device's by default."""
    stored = cache.codes if isinstance(cache, QuantizedBlocks) else cache
    sms, arch = _device(device)
    return Shape(
        heads=heads,
        kv_heads=stored.shape[2],
        dim=stored.shape[3],
        itemsize=dtype.itemsize,
        stored_itemsize=stored.itemsize,
        num_sms=num_sms or sms,
        arch=arch,
        key=(heads, *stored.shape[2:], dtype.itemsize, stored.itemsize, num_sms or 0),
    )


def plan_launches(metadata: AttentionMetadata, query: torch.Tensor, cache: Blocks, num_sms: int | None = None) -> list[Launch]:
    """Those of `metadata`, made when it is first asked for this shape."""
    shape = read_shape(query.shape[1], query.dtype, query.device, cache, num_sms)
    if shape.key not in metadata.launches:
        metadata.launches[shape.key] = _plan(metadata, shape)
    return metadata.launches[shape.key]


def plan_cut(metadata: AttentionMetadata, shape: Shape) -> None:
    """As `plan_launches`, with contexts cut wherever they can be: so that both kernels are launched."""
    metadata.launches[shape.key] = _plan(metadata, shape, most_tiles=1)


class FixedDecodes:
    """Decode steps of `size` sequences, whose launches are alike: of a schedule of so many numbers, into which each step puts
    its own. `tables` [size, M] int32 and `schedule` [num_numbers] int32 stay where they are."""

    def __init__(self, size: int, shape: Shape) -> None:
        self.size, self._shape = size, shape
        self._tiling = shape.tiling(1)
        self._most_items = max(REPLAYED_PROGRAMS * shape.num_sms // shape.kv_heads, 2 * size)
        self.num_numbers = 5 * size + self._most_items + size + 1

    def numbers(self, context_lens: Sequence[int]) -> list[int]:
        """The schedule of a step with these contexts, one a sequence."""
        assert len(context_lens) == self.size
        sequences = [(i, i, 1, length) for i, length in enumerate(context_lens)]
        chunk = self._shape.chunk(sequences, self._tiling, REPLAYED_PROGRAMS)
        schedule = make_schedule(sequences, tokens=1, chunk=chunk * self._tiling.positions)
        assert len(schedule.items) <= self._most_items, "choose_chunk keeps to its bound"
        items = schedule.items + [IDLE] * (self._most_items - len(schedule.items))
        merges = schedule.merges + [IDLE] * (self.size - len(schedule.merges))
        return [number for sequence in schedule.sequences for number in sequence] + items + merges + [chunk]

    def launches(self, schedule: torch.Tensor, tables: torch.Tensor) -> dict[Key, list[Launch]]:
        """For `AttentionMetadata.launches`."""
        assert len(schedule) == self.num_numbers and len(tables) == self.size
        launch = Launch(
            tiling=self._tiling,
            schedule=schedule,
            tables=tables,
            num_sequences=self.size,
            num_items=self._most_items,
            num_merges=self.size,
        )
        return {self._shape.key: [launch]}


def _plan(metadata: AttentionMetadata, shape: Shape, most_tiles: int | None = None) -> list[Launch]:
    """`most_tiles`: of a chunk; as many as are best by default."""
    decodes: list[tuple[int, int, int, int]] = []
    prefills: list[tuple[int, int, int, int]] = []
    start = 0
    for i, (query_len, context_len) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
        (decodes if query_len == 1 else prefills).append((i, start, query_len, context_len))
        start += query_len
    tables, launches = metadata.block_tables.to(torch.int32).contiguous(), []
    for sequences in filter(None, (decodes, prefills)):
        tiling = shape.tiling(max(query_len for _, _, query_len, _ in sequences))
        chunk = most_tiles or shape.chunk(sequences, tiling, MOST_PROGRAMS)
        schedule = make_schedule(sequences, tokens=tiling.tokens, chunk=chunk * tiling.positions)
        numbers = [number for sequence in schedule.sequences for number in sequence] + schedule.items + schedule.merges
        launches.append(
            Launch(
                tiling=tiling,
                schedule=upload([*numbers, chunk], torch.int32, tables.device),
                tables=tables,
                num_sequences=len(sequences),
                num_items=len(schedule.items),
                num_merges=len(schedule.merges),
            )
        )
    return launches


def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and compute capability, 80 for 8.0."""
    if device.type != "cuda":
        return INTERPRETERS
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor
