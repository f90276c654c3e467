"""How products with chosen experts are cut into programs on a GPU. Pure Python, no tensors. Letters: reference.py; R = T * S.

All follows from R and E, never from which experts were chosen: so a step can be recorded, and nothing waits for the device.
The figures come from compiled code (registers, shared memory), not from timing.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_ROWS, MOST_ROWS = 16, 64  # of a block; 16 is the least that tensor cores are given
FINEST = 32  # inputs of a turn at least: a product within the tensor cores takes 16, and bytes of codes hold two


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A program multiplies `outputs` rows of an expert's weights, `inputs` of them a turn; `warps` and `stages` are Triton's.

    `registers`: of a thread, at most, where the compiler by itself takes too few and spills.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int
    registers: int | None = None


def block_rows(choices: int, experts: int) -> int:
    """Choices of a block: as many as an expert has when all are chosen alike, rounded up to a power of two."""
    each = -(-choices // experts)
    return min(MOST_ROWS, max(LEAST_ROWS, 1 << (each - 1).bit_length()))


def every_size(experts: int, each: int) -> dict[int, int]:
    """Tokens, as few as can be, that make blocks of every size, by that; `each`: experts that a token chooses."""
    found: dict[int, int] = {}
    for tokens in range(1, 2 + MOST_ROWS // 2 * experts // each):
        found.setdefault(block_rows(tokens * each, experts), tokens)
    return found


def most_blocks(choices: int, experts: int, rows: int) -> int:
    """Blocks of `rows` that there can be, however the choices fall: those of other ranks are a group as each expert's are."""
    groups = experts + 1
    return choices if choices <= groups else groups + (choices - groups) // rows


def choose_tile(rows: int, *, is_exact: bool, is_coded: bool, group: int) -> Tile:
    """For blocks of so many rows, of weights as they are stored.

    Args:
        is_exact: float32, whose products go without tensor cores. is_coded: weights have fewer than 16 bits.
        group: inputs that share a scale, so that no more of them can be taken in a turn; 0 for all of a row.
    """
    if is_exact:
        return Tile(outputs=32, inputs=FINEST, warps=4, stages=2)
    if rows > 32 or not is_coded:
        return Tile(outputs=64, inputs=min(64, max(FINEST, group)) if group else 64, warps=4, stages=3 if rows > 32 else 4)
    return Tile(outputs=64, inputs=min(128, max(FINEST, group)) if group else 128, warps=2, stages=4)


def choose_paired_tile(rows: int, *, is_exact: bool) -> Tile:
    """As `choose_tile`, of 4-bit weights in pairs."""
    if is_exact:
        return Tile(outputs=64, inputs=128, warps=8, stages=2)
    if rows > 32:
        return Tile(outputs=128, inputs=128, warps=8, stages=3)  # four would spill on sm_120
    return Tile(outputs=64, inputs=128, warps=2, stages=4 if rows == 16 else 3)


def takes_block(inputs: int | None) -> bool:
    """Whether products take FP8 weights of which so many inputs share a scale; None or 0: all of a row."""
    return not inputs or (inputs >= FINEST and inputs & (inputs - 1) == 0)
