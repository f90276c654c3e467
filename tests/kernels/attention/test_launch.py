"""How attention is cut: every position is looked at once, and no multiprocessor idles while a long context is left."""

from __future__ import annotations

from heapq import heapreplace
from itertools import product

import pytest

from vlserve.kernels.attention.launch import (
    MERGE_BYTES,
    PART_BYTES,
    PARTS,
    PROGRAM_BYTES,
    choose_chunk,
    choose_tiling,
    looked_at,
    make_schedule,
)

TILE, TILE_BYTES = 64, 32 * 1024  # of 128 channels in 16 bits


def makespan(lengths: list[int], kv_heads: int, num_sms: int) -> tuple[int, float]:
    """Tiles of the busiest multiprocessor, and on average, where each takes the next program when it is free."""
    chunk = choose_chunk(lengths, kv_heads, tile=TILE, tile_bytes=TILE_BYTES, num_sms=num_sms)
    work = [0] * num_sms
    total = 0
    for length in lengths:
        tiles = -(-length // TILE)
        for first in range(0, tiles, chunk):
            for _ in range(kv_heads):
                size = min(chunk, tiles - first)
                heapreplace(work, work[0] + size)
                total += size
    return max(work), total / num_sms


@pytest.mark.parametrize("num_sms", (108, 132, 148))
@pytest.mark.parametrize("kv_heads", (1, 4, 8))
@pytest.mark.parametrize("batch", (1, 2, 7, 12, 33, 64, 200))
def test_long_contexts_keep_every_multiprocessor_busy(batch: int, kv_heads: int, num_sms: int) -> None:
    busiest, mean = makespan([32768] * batch, kv_heads, num_sms)
    assert busiest <= 1.35 * mean + 2


@pytest.mark.parametrize("kv_heads", (2, 8))
def test_one_long_context_among_short_ones_is_cut(kv_heads: int) -> None:
    busiest, mean = makespan([100_000] + [500] * 63, kv_heads, 132)
    assert busiest <= 2 * mean


def test_four_thousand_positions_of_one_sequence_take_most_multiprocessors() -> None:
    chunk = choose_chunk([4096], 4, tile=TILE, tile_bytes=TILE_BYTES, num_sms=132)
    assert 80 <= -(-4096 // (chunk * TILE)) * 4 <= 132


@pytest.mark.parametrize("lengths,kv_heads", [([60], 4), ([700] * 256, 8), ([1], 1), ([4096] * 132, 8)])
def test_what_gains_nothing_is_not_cut(lengths: list[int], kv_heads: int) -> None:
    assert choose_chunk(lengths, kv_heads, tile=TILE, tile_bytes=TILE_BYTES, num_sms=132) * TILE >= max(lengths)


def test_parts_are_bounded_where_many_programs_are() -> None:
    lengths = [131072] + [2000] * 255
    chunk = choose_chunk(lengths, 8, tile=TILE, tile_bytes=TILE_BYTES, num_sms=132)
    assert sum(-(-length // (chunk * TILE)) for length in lengths) * 8 <= 2 * 256 * 8


def prefill_bytes(lengths: list[int], kv_heads: int, num_sms: int, chunk: int) -> int:
    """What the busiest multiprocessor reads, with programs' own costs, where the longest begin first."""
    tiles = [-(-length // TILE) for length in lengths]
    is_cut = max(tiles) > chunk
    sizes = [min(chunk, count - first) for count in tiles for first in range(0, count, chunk) for _ in range(kv_heads)]
    work = [0] * num_sms
    for size in sorted(sizes, reverse=True):
        heapreplace(work, work[0] + size * TILE_BYTES + PROGRAM_BYTES + PART_BYTES * is_cut)
    return max(work) + MERGE_BYTES * is_cut


@pytest.mark.parametrize("num_sms", (108, 132, 148))
@pytest.mark.parametrize("prompt", ((2048, 2048), (512, 4096), (1024, 1024), (4096, 4096), (1024, 3000), (16, 8000), (128, 8192)))
def test_prompts_are_cut_nearly_as_well_as_can_be(prompt: tuple[int, int], num_sms: int) -> None:
    lengths = looked_at(*prompt, 18)
    chunk = choose_chunk(lengths, 4, tile=TILE, tile_bytes=TILE_BYTES, num_sms=num_sms, longest_first=True)
    longest = -(-max(lengths) // TILE)
    best = min(prefill_bytes(lengths, 4, num_sms, -(-longest // parts)) for parts in PARTS)
    assert prefill_bytes(lengths, 4, num_sms, chunk) <= 1.12 * best


def test_a_prompt_of_its_own_is_not_cut_where_its_q_blocks_suffice() -> None:
    lengths = looked_at(2048, 2048, 18)
    assert choose_chunk(lengths, 4, tile=TILE, tile_bytes=TILE_BYTES, num_sms=132, longest_first=True) * TILE >= 2048


@pytest.mark.parametrize("chunk", (64, 128, 4096))
@pytest.mark.parametrize("tokens", (1, 9))
def test_items_cover_every_position_of_every_q_block_once(tokens: int, chunk: int) -> None:
    sequences = [(0, 0, 1, 1), (2, 1, 1, 700)] if tokens == 1 else [(3, 5, 20, 129), (1, 25, 9, 9), (0, 40, 28, 1000)]
    schedule = make_schedule(sequences, tokens=tokens, chunk=chunk)
    seen: dict[tuple[int, int], list[int]] = {}
    merged = set()
    for item, place in enumerate(schedule.items):
        first, sequence, _, query_len, context_len = schedule.sequences[place]
        num_blocks = -(-query_len // tokens)
        part, block = divmod(item - first, num_blocks)
        stop = looked_at(query_len, context_len, tokens)[block]
        seen.setdefault((sequence, block), []).extend(range(part * chunk, min(part * chunk + chunk, stop)))
        if stop > chunk and part == 0:
            merged.add(item)
    for sequence, _, query_len, context_len in sequences:
        for block, stop in enumerate(looked_at(query_len, context_len, tokens)):
            assert seen[sequence, block] == list(range(stop))
    assert merged <= set(schedule.merges)


def test_tiles_hold_whole_tokens_and_fit() -> None:
    groups, dims = (1, 2, 5, 7, 8, 24, 40), (8, 16, 64, 80, 96, 128, 256)
    rooms = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that a program can have
    for longest, group, dim, itemsize, arch in product((1, 2, 5, 2048), groups, dims, (1, 2, 4), rooms):
        tiling = choose_tiling(longest, group, dim, itemsize, arch)
        assert tiling.rows >= max(16, tiling.tokens * group) and tiling.tokens >= 1
        assert tiling.rows & (tiling.rows - 1) == 0 and tiling.positions >= 16
        assert longest > 1 or tiling.tokens == 1
        loaded = max(32 if itemsize == 1 else 16, 1 << (dim - 1).bit_length())
        ahead = (tiling.num_stages - 1) // 2
        buffers = 2 * ahead if tiling.rows > 32 and itemsize < 4 else ahead  # as compiled code has them
        assert buffers * tiling.positions * 2 * loaded * itemsize <= 0.9 * rooms[arch] * 1024
