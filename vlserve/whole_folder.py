"""A folder that a command writes: it appears when it is whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlserve.errors import ConfigError


def check_out(out: Path) -> Path:
    """The absolute path; raises ConfigError for a place where no new folder can be."""
    out = out.expanduser().resolve()
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}; create it first")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is {'not empty' if out.is_dir() else 'no folder'}; give a new or an empty folder")
    if out.is_mount():  # what is under way could not be renamed to it
        raise ConfigError(f"{out} is where a disk is mounted; give a folder in it")
    return out


def check_room(out: Path, num_bytes: int) -> None:
    """Raises ConfigError where the disk has not so many bytes free."""
    free = shutil.disk_usage(out.parent).free
    if num_bytes > free:
        raise ConfigError(
            f"{out} will have {gib(num_bytes)}, and its disk has {gib(free)} free; make room, or give a folder on another disk"
        )


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block is through, and is removed when it is not."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(f"{out} could not be written: {error}") from error
        raise


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
