"""The files beside a checkpoint's weights that a copy of it needs: settings, tokenizer, templates, licences."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja")
CODE = "*.py"  # what config.json's auto_map names; never read here


def companion_files(folder: Path, *more: str) -> list[Path]:
    """Paths within `folder`, `more` patterns among them; the index of its weights is none of them."""
    found = {path for pattern in (*COMPANIONS, *more) for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found if not path.name.endswith(".index.json"))


def copy_companions(files: Iterable[Path], folder: Path, out: Path) -> None:
    for path in files:
        (out / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / path, out / path)


def without_missing_code(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """config.json without an `auto_map` that names code which `folder` lacks; that of other repositories (`org/name--file.Class`)
    is none of the folder's."""
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return dict(config)
    entries = [entry for value in auto_map.values() for entry in (value if isinstance(value, list) else [value])]
    files = {f"{entry.split('.')[0]}.py" for entry in entries if isinstance(entry, str) and "--" not in entry}
    if all((folder / name).exists() for name in files):
        return dict(config)
    return {key: value for key, value in config.items() if key != "auto_map"}
