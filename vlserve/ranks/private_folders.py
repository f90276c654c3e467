"""Private folders that are locked while their owner lives, so that the next start can remove what a killed process left.

A lock holds across containers that share a file system but no process ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX, LOCK = "vlserve-", "vlserve.lock"


class PrivateFolder:
    """A new folder in `parent`, with mode 0700; raises OSError when there is no room for it."""

    def __init__(self, parent: Path) -> None:
        _remove_abandoned(parent)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock: int | None = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):  # a file system without locks: then nothing is ever removed from it
                fcntl.flock(self._lock, fcntl.LOCK_EX)  # another start may hold it for a moment, while it removes the folder
            if (self.path / LOCK).exists():
                return
            os.close(self._lock)

    def close(self) -> None:
        """Remove it; safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_abandoned(parent: Path) -> None:
    """Folders whose owner was killed: in shared memory they would take room until the machine starts again."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or just being made or removed
            if folder.lstat().st_uid != os.getuid():
                continue
            file = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(file)
