"""A checkpoint's weight files and what their headers say of the tensors in them. No torch: the front and the plan read them too.

Format: https://huggingface.co/docs/safetensors, 8 bytes with the length of a JSON document, that document, the numbers.
Raises ValueError for a file that is no safetensors file, FileNotFoundError where one is missing; both say what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER = 1024  # bytes, by its specification
_MAX_HEADER = 2**27  # bytes; safetensors' own bound is 100 MB
_OTHERS = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack")  # weights in formats that are not read
WEIGHTS = ("*.safetensors", "*.gguf", *_OTHERS)
_CONVERT = "AutoModelForImageTextToText.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `start` to `stop` are bytes of the file. `code` is safetensors' name of its type."""

    code: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sharded or single."""
    files = [folder / name for name in sorted(set(read_index(folder).values()))] or [folder / SINGLE]
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise FileNotFoundError(_explain_absence(folder, absent))
    return files


def read_index(folder: Path) -> dict[str, str]:
    """Names of tensors to names of files; empty for a checkpoint in one file."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = list(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object with a weight_map: {error!r}; download it again") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{INDEX} names a file outside its folder")
    return dict(weight_map)


def read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of several files by name."""
    return {name: tensor for path in files for name, tensor in _read_header(path)}


def is_pointer(path: Path) -> bool:
    """Whether it is what git puts in the place of a large file that git-LFS has not fetched."""
    if not path.is_file() or path.stat().st_size > _MAX_POINTER:
        return False
    return path.read_bytes().startswith(_POINTER)


def explain_pointers(folder: Path, names: Iterable[str]) -> str:
    return (
        f"{folder}: {some(list(names))}: git-LFS pointers, not the files themselves. Run `git lfs pull` in that folder (git lfs "
        "must be installed), or download the model with `hf download`"
    )


def explain_adapter(folder: Path) -> str:
    """`folder` has an adapter and no weights of a model."""
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, OSError, AttributeError):
        base = None
    return (
        f"{folder} is an adapter (LoRA) for {base or 'another model'}, not a model, and adapters are not loaded. Merge it into "
        "that model with peft (`PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(NEW_FOLDER)`), "
        "copy the model's tokenizer and processor files there, and give that folder"
    )


def some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    if is_pointer(path):
        raise ValueError(explain_pointers(path.parent, [path.name]))
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError("its header has no possible length")
            entries: dict[str, Any] = json.loads(file.read(length))
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
            if stop > size:
                raise ValueError(f"it has {size} bytes, and {name} goes up to {stop}")
            yield name, StoredTensor(str(entry["dtype"]), tuple(map(int, entry["shape"])), path, start, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is damaged or no safetensors file: {error}; download it again") from error


def _explain_absence(folder: Path, absent: list[str]) -> str:
    """What to do where weight files are missing."""
    missing = f"checkpoint file missing: {some(absent)} in {folder}"
    if absent != [SINGLE]:
        return f"{missing}, which {INDEX} names; download what is missing (`hf download` goes on where it stopped)"
    if (folder / ADAPTER).exists():
        return explain_adapter(folder)
    found = {pattern: sorted(path.name for path in folder.glob(pattern)) for pattern in WEIGHTS}
    if found["*.safetensors"]:
        return f"{missing}; there is {some(found['*.safetensors'])}, but no {INDEX} that says what belongs to the model: add it"
    if found["*.gguf"]:
        return f"{missing}; {some(found['*.gguf'])}: {GGUF}"
    others = [name for pattern in _OTHERS for name in found[pattern]]
    if others:
        return (
            f"{missing}; there is {some(others)}, and only safetensors are read. Take an edition with safetensors, or convert it "
            f"with transformers: {_CONVERT}"
        )
    return f"{missing}. Only safetensors are read; download the weights, or give the folder that has them"


GGUF = (
    "GGUF is llama.cpp's format and is not read; give the model that it was made from, in safetensors. 4-bit weights are read as "
    "AWQ, GPTQ or compressed-tensors, and `vlserve quantize` makes them"
)
