"""Streams a checkpoint's tensors from safetensors files into parameters, strictly both ways.

A model says which tensor (a parameter, or rows of a fused one) each checkpoint name fills; this file
reads one at a time, so memory above the parameters is one tensor. It knows nothing of any model's shape. A name that nobody
expects, a wrong shape, and a parameter that was never written are errors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def load_weights(
    folder: Path,
    targets: Mapping[str, torch.Tensor],
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Fill every target from the checkpoint in `folder`; returns the bytes read.

    Args:
        targets: tensors to write into, by the name that `rename` gives a checkpoint tensor.
        rename: checkpoint name to target name; None for a tensor to pass over on purpose.
        progress: called with (files done, files in all).

    Raises:
        FileNotFoundError: a weight file is missing. ValueError: a tensor is unexpected, missing,
        doubly given, of the wrong shape, or its file is damaged; the message lists the names.
    """
    files = checkpoint_files(folder)
    missing = dict(targets)
    unexpected: list[str] = []
    num_bytes = 0
    for done, path in enumerate(files):
        progress(done, len(files))
        for checkpoint_name, tensor in _tensors(path):
            name = rename(checkpoint_name)
            if name is None:
                continue
            if name not in missing:
                reason = "given twice" if name in targets else "not part of this architecture"
                unexpected.append(f"{checkpoint_name} ({reason})")
                continue
            target = missing.pop(name)
            if target.shape != tensor.shape:
                raise ValueError(
                    f"{path.name}: {checkpoint_name} is {list(tensor.shape)}, config.json asks for {list(target.shape)}"
                )
            target.copy_(tensor)
            num_bytes += tensor.nbytes
    progress(len(files), len(files))
    if unexpected:
        raise ValueError(f"unexpected weights in {folder.name}: {_some(unexpected)}")
    if missing:
        raise ValueError(f"weights missing from {folder.name}: {_some(list(missing))}")
    return num_bytes


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


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file: {error}") from error


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
