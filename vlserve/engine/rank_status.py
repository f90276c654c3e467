"""A small file that the ranks of a node write and their front reads: what each is doing at this moment.

It answers one question: which rank does everyone wait for? A mapped file answers it also when the rank is stopped, dead,
or deep in a collective.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

_SLOT = struct.Struct("<qd24s")  # collectives entered, when (monotonic seconds), kind or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatus:
    """Where a rank is; `kind` is the collective that it waits in, "" when it computes."""

    number: int  # collectives entered so far
    since_s: float  # seconds since it entered or left
    kind: str


class RankStatusWriter:
    """A rank's pen. Without a file it writes nowhere."""

    def __init__(self, path: Path | None = None, slot: int = 0) -> None:
        self._number = 0
        self._offset = slot * _SLOT.size
        self._map: mmap.mmap | None = None
        if path is not None:
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0)

    def enter(self, kind: str) -> None:
        self._number += 1
        self._write(kind)

    def leave(self) -> None:
        self._write("")

    def _write(self, kind: str) -> None:
        if self._map is not None:
            _SLOT.pack_into(self._map, self._offset, self._number, time.monotonic(), kind.encode()[:24])


class RankStatusReader:
    """The front's side: makes the file, reads it."""

    def __init__(self, path: Path, num_ranks: int) -> None:
        self.path, self._num_ranks = path, num_ranks
        path.write_bytes(bytes(_SLOT.size * num_ranks))

    def read(self) -> list[RankStatus]:
        data, now = self.path.read_bytes(), time.monotonic()
        slots = [_SLOT.unpack_from(data, i * _SLOT.size) for i in range(self._num_ranks)]
        return [
            RankStatus(number=number, since_s=now - when if when else 0.0, kind=kind.rstrip(b"\0").decode(errors="replace"))
            for number, when, kind in slots
        ]
