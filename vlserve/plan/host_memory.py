"""How much of the machine's memory is still to be had; no torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

GIB = 2**30


def available_memory() -> float:
    """Bytes that this process may still take: the machine's, within a container's limit (cgroup v2)."""
    available: float = 4 * GIB  # where the system does not say
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available
