"""Streams a checkpoint's tensors from safetensors files into parameters, strictly both ways.

A model says what each checkpoint name fills: a tensor of the same shape, or a `Slot` that takes a span of it. This file
reads one at a time and of each only the span, so memory above the parameters is one tensor's part. It knows nothing of any
model's shape. A name that no part of the model expects, a wrong shape, and a parameter that was never written are errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vlserve.llm.formats import ReadSlot, Slot
from vlserve.llm.stored_files import checkpoint_files, explain_pointers, is_pointer, read_index, some
from vlserve.llm.stored_names import Renamed, expanded
from vlserve.llm.tensor_parallel import Span

log = logging.getLogger(__name__)

Target = torch.Tensor | Slot
Rename = Callable[[str], Renamed]
Progress = Callable[[int, int], None]
BUFFERS = ("position_ids", "inv_freq", "masked_bias")  # older editions store them; what is in them follows from config.json


def load_weights(
    folder: Path,
    targets: Mapping[str, Target],
    *,
    files: Sequence[Path] | None = None,
    rename: Rename = lambda name: name,
    progress: Progress = lambda done, total: None,
) -> int:
    """Fill every target from the checkpoint in `folder`; returns the bytes read.

    Args:
        targets: what to write into, by the name that `rename` gives a checkpoint tensor.
        files: what to read, where it is not `checkpoint_files`.
        rename: checkpoint name to target name, or to the parts that it has; None for a tensor to pass over on purpose.
        progress: called with (files done, files in all).

    Raises:
        FileNotFoundError: a weight file is missing. ValueError: a tensor is unexpected, missing,
        doubly given, of the wrong shape, or its file is damaged; the message lists the names.
    """
    tensors = match_tensors(folder, targets, files=files, rename=rename, progress=progress)
    return sum(fill(targets[name], stored) for name, stored in tensors)


def match_tensors(
    folder: Path,
    targets: Mapping[str, Target],
    *,
    files: Sequence[Path] | None = None,
    rename: Rename = lambda name: name,
    progress: Progress = lambda done, total: None,
) -> Iterator[tuple[str, Any]]:
    """(target name, handle on the stored tensor) of each target, in the files' order; arguments and errors as `load_weights`.

    A wrong shape raises at once, unexpected and missing names at the end; what is passed over is logged there.
    """
    files = checkpoint_files(folder) if files is None else files
    missing, others = dict(targets), _Others(folder, targets)
    for done, path in enumerate(files):
        progress(done, len(files))
        for checkpoint_name, name, stored in _renamed(path, rename):
            if name not in missing:
                others.take(checkpoint_name, name, path)
                continue
            full = slot_of(missing.pop(name)).full
            if tuple(stored.get_shape()) != full:
                raise ValueError(f"{path.name}: {checkpoint_name} is {stored.get_shape()}, config.json asks for {list(full)}")
            yield name, stored
    progress(len(files), len(files))
    others.settle()
    if missing:
        raise ValueError(f"weights missing from {folder.name}: {some(list(missing))}; download or write them again")


class _Others:
    """Tensors that fill nothing. One within a part of the model means that config.json tells another model: an error. Buffers
    are passed over, and so is what belongs to no part or stands in no index, as a value head; transformers does the same."""

    def __init__(self, folder: Path, targets: Mapping[str, Target]) -> None:
        self._folder, self._targets, self._index = folder, targets, read_index(folder)
        self._parts = {name.split(".")[0] for name in targets}
        self._unexpected: list[str] = []
        self._unused: list[str] = []

    def take(self, stored_name: str, name: str, path: Path) -> None:
        if name in self._targets:
            if self._index.get(stored_name, path.name) == path.name:
                self._unexpected.append(f"{stored_name} (given twice)")
        elif name.rpartition(".")[2] in BUFFERS:
            return
        elif name.split(".")[0] in self._parts and (not self._index or stored_name in self._index):
            self._unexpected.append(f"{stored_name} (not part of this architecture)")
        else:
            self._unused.append(stored_name)

    def settle(self) -> None:
        """Each stored tensor once, whatever parts it has."""
        if self._unexpected:
            raise ValueError(f"unexpected weights in {self._folder.name}: {some(list(dict.fromkeys(self._unexpected)))}")
        if self._unused:
            log.warning("%s: not part of this model and not used: %s", self._folder.name, some(list(dict.fromkeys(self._unused))))


def slot_of(target: Target) -> Slot:
    """A tensor as the slot that takes all of a stored tensor."""
    return target if isinstance(target, Slot) else Slot(target, tuple(target.shape), {})


def fill(target: Target, stored: Any) -> int:
    """Copy the target's span of a stored tensor, which has its shape; returns the bytes read."""
    slot = slot_of(target)
    if isinstance(slot, ReadSlot):
        return slot.read(stored)
    spans = [slot.spans.get(dim, Span(0, size, size)) for dim, size in enumerate(slot.full)]
    if any(span.stop - span.start < span.size for span in spans):
        slot.tensor.zero_()
    if any(span.stop == span.start for span in spans):
        return 0  # this rank has padding only
    part = stored[tuple(slice(span.start, span.stop) for span in spans)] if spans else stored[...]
    slot.tensor[tuple(slice(span.stop - span.start) for span in spans)].copy_(part)
    return int(part.nbytes)


def _renamed(path: Path, rename: Rename) -> Iterator[tuple[str, str, Any]]:
    """(name in the file, target name, handle on the stored tensor or a part of it)."""
    for stored_name, stored in _tensors(path):
        for name, handle in expanded(rename(stored_name), stored):
            yield stored_name, name, handle


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, handle on the stored tensor) of each."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, file.get_slice(name)
    except SafetensorError as error:
        if is_pointer(path):
            raise ValueError(explain_pointers(path.parent, [path.name])) from error
        raise ValueError(f"{path.name} is damaged or no safetensors file: {error}") from error
