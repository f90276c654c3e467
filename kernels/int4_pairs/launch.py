"""How the product is launched: a table by architecture and shape class in launch.json, read once.

Nothing is tried out at run time. A class is the rows of a product, rounded up to 16, 32, 64 or 128, and "wide" or "narrow" by the
outputs. An architecture that the table lacks, such as sm_86 or sm_120, is launched as sm_80 is, which asks for nothing that
others lack.
The figures come from compiled code (registers, shared memory, instructions a weight) and from arithmetic; where an architecture's
table names a card, they are the fastest of those that `python -m vlserve.kernels.tune` has timed on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("launch.json")
FALLBACK = "sm_80"
CARD = "card"  # beside the classes: what the table was timed on
ROWS = (16, 32, 64, 128)
WIDE = 16384  # outputs
MOST_SUMS = 64  # numbers that a thread adds up, beside as many of a group
SPLIT = 4  # tokens of a program to a block of inputs of a part: less, and writing the parts takes as long as reading weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A program computes block_t rows of block_n outputs; `waves` programs a multiprocessor, at least, keep a device busy.

    `registers`: of a thread, at most, where the compiler by itself takes too few and spills.
    """

    block_t: int
    block_n: int
    warps: int
    stages: int
    waves: int
    registers: int | None = None


def choose(architecture: str, rows: int, outputs: int, dtype: torch.dtype) -> Launch:
    """For `rows` of a product with so many outputs; beyond the last class the last one."""
    row_class = next((size for size in ROWS if rows <= size), ROWS[-1])
    return fitted(launches_of(architecture)[f"{row_class} {'wide' if outputs >= WIDE else 'narrow'}"], dtype)


@cache
def fitted(launch: Launch, dtype: torch.dtype) -> Launch:
    """Of half the rows where float16, which keeps a second product beside the first, would have too few registers."""
    is_full = launch.block_t * launch.block_n >= MOST_SUMS * 32 * launch.warps
    return replace(launch, block_t=launch.block_t // 2) if dtype == torch.float16 and is_full and launch.block_t > 32 else launch


@cache
def split(launch: Launch, programs: int, blocks: int, multiprocessors: int) -> int:
    """In how many parts to add up `blocks` of inputs, when one part is so many programs; no part is empty.

    Of the splits with enough programs, the one that loads all multiprocessors most alike, and of those the coarsest.
    """
    least = min(blocks, max(1, launch.block_t // SPLIT))
    candidates = sorted({-(-blocks // each) for each in range(least, blocks + 1)})
    enough = [parts for parts in candidates if programs * parts >= launch.waves * multiprocessors] or candidates[-1:]

    def evenness(parts: int) -> float:
        rounds = programs * parts / multiprocessors
        return round(rounds / -(-rounds // 1), 1)

    return max(enough, key=lambda parts: (evenness(parts), -parts))


@cache
def launches() -> dict[str, dict[str, Launch]]:
    """By architecture and class."""
    table = json.loads(TABLE.read_text())
    return {
        architecture: {name: Launch(**fields) for name, fields in of.items() if name != CARD}
        for architecture, of in table.items()
    }


def launches_of(architecture: str) -> dict[str, Launch]:
    """By class; those of sm_80 where the table lacks the architecture."""
    table = launches()
    return table.get(architecture, table[FALLBACK])


@cache
def device_of(index: int) -> tuple[str, int]:
    """A CUDA device's architecture, as in "sm_90", and its multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count
