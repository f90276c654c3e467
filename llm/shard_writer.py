"""Writes a checkpoint's tensors cut for tensor parallelism; shards.py says in which format.

The files are written side by side, so that each stored tensor is read once, and memory holds parts of tensors, never a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from vlserve.llm.formats import Slot
from vlserve.llm.tensor_file import Kind, TensorFile
from vlserve.llm.tensor_parallel import Group, Span
from vlserve.llm.weights import Rename, Target, fill, match_tensors, slot_of

SHARED = "shared.safetensors"
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # types that can be asked for, as stored


class OfflineGroup(Group):
    """A rank as far as shapes go: it meets no others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


class ShardFile(TensorFile):
    """One file to be: `slots` by name, on the meta device."""

    def __init__(self, name: str, slots: Mapping[str, Slot], kinds: Mapping[str, Kind]) -> None:
        super().__init__(name, {key: (kinds[key], slot.tensor.shape) for key, slot in slots.items()})
        self.slots = slots


class ShardWriter:
    """Reads the headers of the checkpoint in `folder`, strictly; `write` does the rest.

    Args:
        ranks: of each rank, what a checkpoint's names fill, on the meta device.
        rename: as in `load_weights`.
        dtype: float32, bfloat16 or float16 for all floating-point tensors; None leaves each as it is stored.

    Raises FileNotFoundError and ValueError as `load_weights`.
    """

    def __init__(
        self, folder: Path, ranks: Sequence[Mapping[str, Target]], *, rename: Rename, dtype: torch.dtype | None = None
    ) -> None:
        self._folder, self._rename = folder, rename
        # whole shapes are the same on all ranks; experts may be on one alone
        self._targets = {name: target for targets in ranks for name, target in targets.items()}
        self._kinds: dict[str, Kind] = {}
        for name, stored in match_tensors(folder, self._targets, rename=rename):
            kind = Kind.of(stored)
            self._kinds[name] = Kind(dtype, CODES[dtype]) if dtype is not None and kind.dtype.is_floating_point else kind
        slots = [{name: slot_of(target) for name, target in targets.items()} for targets in ranks]
        shared = {
            name: slot
            for name, slot in slots[0].items()
            if all(name in of_rank and _is_whole(of_rank[name]) for of_rank in slots)
        }
        parts = [{name: slot for name, slot in of_rank.items() if name not in shared} for of_rank in slots]
        names = [f"rank-{rank}-of-{len(ranks)}.safetensors" for rank in range(len(ranks))]
        pairs = [(SHARED, shared), *zip(names, parts, strict=True)]
        self._files = [ShardFile(name, slots, self._kinds) for name, slots in pairs if slots]
        written = {file.name for file in self._files}
        self.rank_files = [[file for file in (SHARED, name) if file in written] for name in names]

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(file.num_bytes for file in self._files)

    @property
    def num_files(self) -> int:
        return len(self._files)

    def write(self, out: Path, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Write all files into the folder `out`; `progress` is told the bytes of each part that was written."""
        with ExitStack() as stack:
            files = {shard: stack.enter_context((out / shard.name).open("wb")) for shard in self._files}
            for shard, file in files.items():
                progress(file.write(shard.header))
            for name, stored in match_tensors(self._folder, self._targets, rename=self._rename):
                for shard, file in files.items():
                    if name in shard.slots:
                        slot = shard.slots[name]
                        part = torch.empty(slot.tensor.shape, dtype=self._kinds[name].dtype)
                        fill(Slot(part, slot.full, slot.spans), stored)
                        shard.write(file, name, part)
                        progress(part.nbytes)
            for file in files.values():  # so that a disk's errors come now
                file.flush()
                os.fsync(file.fileno())


def _is_whole(slot: Slot) -> bool:
    return all(span == Span(0, slot.full[dim], slot.full[dim]) for dim, span in slot.spans.items())
