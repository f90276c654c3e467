"""What people point at instead of a checkpoint's folder, and what to do about it. Nothing is loaded here."""

from __future__ import annotations

from pathlib import Path

from vlserve.errors import ModelError
from vlserve.llm.stored_files import ADAPTER, GGUF, explain_adapter, explain_pointers, is_pointer, some

CONFIG = "config.json"
MAX_DEPTH, MAX_LOOKED_AT = 3, 2000  # folders below; a cache's models--org--name has its files at depth 2


def check_config(folder: Path) -> None:
    """Raises ModelError for a folder that is no checkpoint's."""
    if not (folder / CONFIG).exists():
        raise ModelError(_explain_no_config(folder))
    if is_pointer(folder / CONFIG):
        raise ModelError(explain_pointers(folder, [CONFIG]))


def check_folder(folder: Path) -> None:
    """`check_config`, and ModelError for any file that git-LFS has not fetched."""
    check_config(folder)
    pointers = sorted(path.name for path in folder.iterdir() if is_pointer(path))
    if pointers:
        raise ModelError(explain_pointers(folder, pointers))


def explain_file(path: Path) -> str:
    """What to give instead of a file."""
    if path.suffix == ".gguf":
        return f"{path}: {GGUF}"
    return f"{path} is a file; give the folder that has config.json and the weights: {path.resolve().parent}"


def _explain_no_config(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    missing = f"{folder}: checkpoint file missing: {CONFIG}"
    if not names:
        return f"{folder} is empty; give the folder that has {CONFIG} and the weights"
    if ADAPTER in names:
        return explain_adapter(folder)
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"{missing}; there is {some(gguf)}. {GGUF}"
    below = _checkpoints_below(folder)
    if below:
        return f"{missing}. Folders below it have one; give {' or '.join(map(str, below[:4]))}"
    if (folder.parent / CONFIG).is_file():
        return f"{missing}. The folder above has one; give {folder.parent}"
    return f"{missing}; there is {some(names)}. Give the folder that has {CONFIG} and the weights, or download the model again"


def _checkpoints_below(folder: Path) -> list[Path]:
    """Those with weights, or where there are none, with a config.json alone."""
    level, found, looked_at = [folder], [], 0
    for _ in range(MAX_DEPTH):
        level = [path for above in level for path in sorted(above.iterdir()) if path.is_dir()]
        looked_at += len(level)
        found += [path for path in level if (path / CONFIG).is_file()]
        if looked_at > MAX_LOOKED_AT:
            break
    return [path for path in found if any(path.glob("*.safetensors"))] or found
