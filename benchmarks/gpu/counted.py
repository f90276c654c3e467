"""What was counted in the kernels' machine code, from the table in docs/kernels.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TABLE = Path(__file__).parents[2] / "docs/kernels.md"
KINDS = {"auto": "bf16", "int8": "bf16 int8", "fp8": "bf16 E4M3 by bits"}  # of a cache, as the table names them


@dataclass(frozen=True, slots=True)
class Counted:
    """Registers of a thread, bytes of shared memory of a program, and instructions a number, 0 where none were counted."""

    registers: int
    shared: int
    per_number: float


def counted(kernel: str, types: str, configuration: str, architecture: str) -> Counted:
    """Raises KeyError for what the table does not have."""
    return _table()[kernel, types, configuration, architecture]


@cache
def _table() -> dict[tuple[str, str, str, str], Counted]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {
        (row[0], row[1], row[2], row[3]): Counted(int(_first(row[4])), int(_first(row[6])), float(_first(row[8]) or 0))
        for row in rows
        if len(row) == 9 and row[3].startswith("sm_")
    }


def _first(cell: str) -> str:
    """The figure before its cap."""
    found = re.match(r"[\d.]+", cell)
    return found[0] if found else ""
