"""What every part is given: the device, how large to make things, where to keep them, and where to write what it finds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contact.isolated import append_row

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """`items`: questions, every other one about a picture; `tokens`: of an answer, at most; `forms`: questions to other types."""

    items: int
    tokens: int
    forms: int
    large_items: int
    large_tokens: int
    max_num_seqs: int
    context: int  # of the step that is timed
    runs: int  # of each timing
    at_once: int  # processes with a kernel each


REAL = Scale(items=24, tokens=16, forms=12, large_items=4, large_tokens=4, max_num_seqs=16, context=1024, runs=20, at_once=12)
TINY = Scale(items=2, tokens=3, forms=2, large_items=2, large_tokens=2, max_num_seqs=2, context=32, runs=1, at_once=2)


class PreparedError(Exception):
    """All that needs no device is done, and no more was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`kept`: what later runs take again; `rows`: the file of findings; `log`: of what is printed.

    `is_prepared_only`: nothing is done that needs a device.
    """

    part: str
    kept: Path
    rows: Path
    log: Path
    is_rehearsed: bool
    is_prepared_only: bool
    scale: Scale

    def found(self, **row: Any) -> None:
        """A finding, written at once, so that it outlives the process; and printed into the log."""
        append_row(self.rows, {"part": self.part, **row})
        print(", ".join(f"{name} {value}" for name, value in row.items()))

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """In it `cuda` is there: the card, or what stands for it. Whatever the CPU must do first is done before, and kept."""
        if self.is_prepared_only:
            raise PreparedError
        if self.is_rehearsed:
            from benchmarks.contact.rehearsed import rehearsed

            with rehearsed():
                yield
            return
        import torch

        with torch.backends.cudnn.flags(allow_tf32=False):  # float32 is compared with the CPU's
            yield
