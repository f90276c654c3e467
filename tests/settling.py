"""What settles by itself: read again and again until it is as wanted, or for so long that it never will be."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")
PATIENCE_S = 120  # generous: the end of waiting for what does not come, and no measure of speed


def eventually(read: Callable[[], T], wanted: Callable[[T], object], what: str = "", *, seconds: float = PATIENCE_S) -> T:
    """The first value that is as wanted; fails with the last one read."""
    deadline = time.monotonic() + seconds
    while not wanted(value := read()):
        assert time.monotonic() < deadline, f"did not happen: {what or wanted}; the last seen is {value!r}"
        time.sleep(0.05)
    return value


def wait_until(condition: Callable[[], bool], what: str = "", *, seconds: float = PATIENCE_S) -> None:
    eventually(condition, bool, what or str(condition), seconds=seconds)


def is_alive(process: psutil.Process) -> bool:
    """Not so a zombie: whoever has to take an orphan's status may never do it, as in a container without an init."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
