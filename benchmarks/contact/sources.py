"""The files that decide whether what passed still passes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from benchmarks.contact.setting import ROOT

ENGINE = ("vlserve/config.py", "vlserve/engine", "vlserve/models", "vlserve/prompt", "llm", "vision", "kernels")
KINDS = (".py", ".json", ".jinja")


@cache
def digest_of(places: tuple[str, ...], without: str = "\0") -> str:
    """Of the names and contents of all code and tables in these files and folders of the repository."""
    digest = hashlib.sha256()
    for path in _files(places):
        if not path.name.startswith(without):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _files(places: Iterable[str]) -> Iterable[Path]:
    for place in places:
        path = ROOT / place
        yield from sorted(one for one in path.rglob("*") if one.suffix in KINDS) if path.is_dir() else [path]
