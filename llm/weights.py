"""Streams a checkpoint's tensors from safetensors files into parameters, strictly both ways.

A model says what each checkpoint name fills: a tensor of the same shape, or a `Slot` that takes a span of it. This file
reads one at a time and of each only the span, so memory above the parameters is one tensor's part. It knows nothing of any
model's shape. A name that nobody expects, a wrong shape, and a parameter that was never written are errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vlserve.llm.formats import ReadSlot, Slot
from vlserve.llm.tensor_parallel import Span

Target = torch.Tensor | Slot
Rename = Callable[[str], str | None]
Progress = Callable[[int, int], None]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
        rename: checkpoint name to target name; None for a tensor to pass over on purpose.
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

    A wrong shape raises at once, unexpected and missing names at the end.
    """
    files = checkpoint_files(folder) if files is None else files
    missing = dict(targets)
    unexpected: list[str] = []
    for done, path in enumerate(files):
        progress(done, len(files))
        for checkpoint_name, stored in _tensors(path):
            name = rename(checkpoint_name)
            if name is None:
                continue
            if name not in missing:
                reason = "given twice" if name in targets else "not part of this architecture"
                unexpected.append(f"{checkpoint_name} ({reason})")
                continue
            full = slot_of(missing.pop(name)).full
            if tuple(stored.get_shape()) != full:
                raise ValueError(f"{path.name}: {checkpoint_name} is {stored.get_shape()}, config.json asks for {list(full)}")
            yield name, stored
    progress(len(files), len(files))
    if unexpected:
        raise ValueError(f"unexpected weights in {folder.name}: {_some(unexpected)}")
    if missing:
        raise ValueError(f"weights missing from {folder.name}: {_some(list(missing))}")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or single; raises FileNotFoundError."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{INDEX} names a file outside its folder")
        files = [folder / name for name in names]
    else:
        files = [folder / SINGLE]
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise FileNotFoundError(
            f"checkpoint file missing: {_some(absent)} in {folder}. Only safetensors are read; download the missing file, "
            "or convert the checkpoint with save_pretrained"
        )
    return files


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


def _tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """(name, handle on the stored tensor) of each."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, file.get_slice(name)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file: {error}") from error


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
