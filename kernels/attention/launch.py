"""How paged attention is cut into programs for a GPU: tiles, Q-blocks, and parts of long contexts. Pure Python, no tensors.

A Q-block is the rows of one tile: some query tokens of one sequence times the G query heads of a KV head. Its context is
cut into chunks, each a program's, so that a few long sequences keep all multiprocessors busy; what the programs of a
Q-block found is merged after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

LEAST_ROWS, MOST_ROWS = 16, 128  # of a tile; 16 is the least that tensor cores multiply
IN_FLIGHT = 48 * 1024  # bytes of keys and values that a program asks for ahead; an H200 needs 26 KB a multiprocessor
ROOMY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}  # KiB of shared memory for a program, by compute capability
ROOM = 99  # of others, such as 86, 89 and 120
DECODING_REGISTERS = 168  # with 16-bit caches: three programs a multiprocessor, as many as the tiles in flight leave room for
WIDE_REGISTERS = 208  # of short prompts in wide heads: with fewer, they spill in loops on sm_100 and sm_120; see most_registers
# in bytes of keys and values that a multiprocessor reads meanwhile, by the bandwidth and latencies of an H100:
PROGRAM_BYTES = 24 * 1024  # a program's start and end
PART_BYTES = 8 * 1024  # a part's result, written and read
MERGE_BYTES = 64 * 1024  # a second kernel
GOOD_ENOUGH = 1.1  # times the ideal: no more parts are looked for
MOST_PROGRAMS = 16  # a multiprocessor, once contexts are cut: bounds the memory of parts
PARTS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256)  # of the longest context, to be tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """A tile has `rows` rows, of `tokens` query tokens, and `positions` keys; `num_warps` and `num_stages` are Triton's.

    `registers`: of a thread, at most, where the compiler by itself takes too few and spills.
    """

    rows: int
    tokens: int
    positions: int
    num_warps: int
    num_stages: int
    registers: int | None

    def most_registers(self, *, is_coded: bool, has_sinks: bool, window: int) -> int | None:
        """`registers`; of few rows with codes and sinks so many that none spill: more with a window, whose programs are short."""
        if not (is_coded and has_sinks and self.rows <= 32):
            return self.registers
        return WIDE_REGISTERS if window else DECODING_REGISTERS


def padded(dim: int, *, is_coded: bool) -> int:
    """Numbers of a head as the kernel loads them: tensor cores take 16 at once, and codes are taken apart by two."""
    return max(32 if is_coded else 16, _power_of_2(dim))


@lru_cache
def choose_tiling(longest_query: int, group: int, dim: int, itemsize: int, arch: int) -> Tiling:
    """For up to `longest_query` query tokens a sequence and `group` query heads a KV head.

    Args:
        itemsize: bytes of a number in the cache; 4 as well where queries are float32, whose products go without tensor
            cores, in small tiles.
        arch: compute capability, 80 for 8.0; before 90, and from 120 on, tensor cores take keys and values from registers.
    """
    wanted = longest_query * group
    most = MOST_ROWS if dim <= 128 else MOST_ROWS // 2  # a row's sums take registers
    rows = most if wanted > 32 and itemsize < 4 else 32 if wanted > LEAST_ROWS else LEAST_ROWS
    rows = max(rows, _power_of_2(group))
    each = 2 * padded(dim, is_coded=itemsize == 1) * itemsize  # bytes a position
    if itemsize == 4:
        positions, ahead = 16, 1
    elif rows > 32:
        positions, ahead = 64, 2
        if itemsize == 1:  # registers for the codes' numbers
            positions //= 2
        if not 90 <= arch < 120 and dim > 64:
            positions //= 2
        while 2 * ahead * positions * each > ROOMY.get(arch, ROOM) * 1024:  # a tile is kept where it came and as it is multiplied
            positions //= 2
    else:
        positions = 128 if each < 256 else 64
        ahead = -(-IN_FLIGHT // (positions * each))
    registers = WIDE_REGISTERS if longest_query > 1 and rows == 32 and dim > 64 else DECODING_REGISTERS
    return Tiling(
        rows=rows,
        tokens=1 if longest_query == 1 else rows // group,
        positions=positions,
        num_warps=8 if rows > 32 or (itemsize == 4 and rows == 32 and dim > 64) else 4,  # float32: products in registers
        num_stages=1 + 2 * ahead,  # a tile's addresses are loaded one stage ahead of its numbers
        registers=registers if rows <= 32 and itemsize == 2 else None,
    )


def choose_chunk(
    lengths: Sequence[int],
    kv_heads: int,
    *,
    tile: int,
    tile_bytes: int,
    num_sms: int,
    longest_first: bool = False,
    most_programs: int = MOST_PROGRAMS,
) -> int:
    """Tiles of a context that one program goes over; as many as the longest has where no context is worth cutting.

    Args:
        lengths: positions that each Q-block looks at; each has a program a KV head and chunk.
        tile: positions of a tile. tile_bytes: their keys and values of one head. num_sms: multiprocessors of the device.
        longest_first: programs begin in the order of their work, as prefill's do.
        most_programs: a multiprocessor, once contexts are cut.

    The time of a choice is estimated in bytes: programs go to multiprocessors as these become free. Where the longest begin
    first, all end together but for a shortest program; otherwise they take the mean time, rounded up to whole programs, and the
    longest may begin last.
    """
    tiles = [-(-length // tile) for length in lengths]
    longest, whole = max(tiles), sum(tiles) * kv_heads
    uncut = len(tiles) * kv_heads
    ideal = max(whole * tile_bytes + uncut * PROGRAM_BYTES, num_sms * (tile_bytes + PROGRAM_BYTES)) / num_sms
    best, chosen = float("inf"), longest
    for parts in PARTS:
        chunk = -(-longest // parts)
        programs = sum(-(-count // chunk) for count in tiles) * kv_heads
        if parts > 1 and programs > max(most_programs * num_sms, 2 * uncut):
            break
        beside, rounds, mean = PROGRAM_BYTES + (PART_BYTES if parts > 1 else 0), -(-programs // num_sms), whole / programs
        if longest_first:
            shortest = min((count - 1) % chunk + 1 for count in tiles)
            level = (whole * tile_bytes + programs * beside) / num_sms + shortest * tile_bytes + beside
            time = max(chunk * tile_bytes + beside, min(level, rounds * (chunk * tile_bytes + beside)))
        else:
            time = rounds * (mean * tile_bytes + beside) + (chunk - mean) * tile_bytes
        time += MERGE_BYTES if parts > 1 else 0
        if time < best:
            best, chosen = time, chunk
        if best <= GOOD_ENOUGH * ideal or chunk == 1:
            break
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The programs of one launch, each named by an item: a Q-block and a part of its context, for every KV head.

    A sequence's items follow one another: its first `n` are the first parts of its n Q-blocks, the next n their second parts.
    """

    sequences: list[tuple[int, int, int, int, int]]  # first item, sequence, first query token, query_len, context_len
    items: list[int]  # the place in `sequences` of each item
    merges: list[int]  # first items of Q-blocks whose sequence is cut


def make_schedule(sequences: Sequence[tuple[int, int, int, int]], *, tokens: int, chunk: int) -> Schedule:
    """sequences: (sequence, first query token, query_len, context_len); tokens of a Q-block, positions of a chunk."""
    schedule = Schedule(sequences=[], items=[], merges=[])
    for place, sequence in enumerate(sequences):
        _, _, query_len, context_len = sequence
        first, num_blocks, parts = len(schedule.items), -(-query_len // tokens), -(-context_len // chunk)
        schedule.sequences.append((first, *sequence))
        schedule.items.extend([place] * (num_blocks * parts))
        if parts > 1:
            schedule.merges.extend(range(first, first + num_blocks))
    return schedule


def looked_at(query_len: int, context_len: int, tokens: int) -> list[int]:
    """Positions that each Q-block of a sequence looks at, for `choose_chunk`."""
    before = context_len - query_len
    return [before + min(first + tokens, query_len) for first in range(0, query_len, tokens)]


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
