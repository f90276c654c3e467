"""Pictures' tiles in shared memory, where every rank of this machine can map them.

A file is there while a request that needs it is open. Where shared memory is missing or full, files of an ordinary folder serve.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path

from vlserve.engine.messages import pixel_file
from vlserve.errors import OverloadedError

SHARED = Path("/dev/shm")
PREFIX = "vlserve-"


class PixelFiles:
    """`put` and `release` are thread-safe and count the users of each picture."""

    def __init__(self, fallback: Path) -> None:
        self.folders = [fallback / "pixels"]
        self.folders[0].mkdir()
        self._lock_file: int | None = None
        if SHARED.is_dir() and os.access(SHARED, os.W_OK):
            _remove_abandoned()
            self.folders.insert(0, Path(tempfile.mkdtemp(prefix=PREFIX, dir=SHARED)))  # mode 0700
            self._lock_file = _lock(self.folders[0])
        self._users: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def put(self, digest: bytes, tiles: memoryview) -> None:
        """Tiles as plain bytes; raises OverloadedError when there is no room for them."""
        with self._lock:
            self._users[digest] += 1
            if self._users[digest] > 1:
                return
            for folder in self.folders:
                path = folder / pixel_file(digest)
                try:
                    with path.open("wb") as file:
                        if hasattr(os, "posix_fallocate"):  # a full file system says so here, not by a signal when it is mapped
                            os.posix_fallocate(file.fileno(), 0, tiles.nbytes)
                        file.write(tiles)
                    return
                except OSError:
                    path.unlink(missing_ok=True)
            del self._users[digest]
        where = " and ".join(str(folder.parent) for folder in self.folders)
        raise OverloadedError(
            f"there is no room for the picture's tiles in {where}; try again later, or send fewer pictures at once"
        )

    def release(self, digest: bytes) -> None:
        with self._lock:
            self._users[digest] -= 1
            if self._users[digest] <= 0:
                del self._users[digest]
                for folder in self.folders:
                    (folder / pixel_file(digest)).unlink(missing_ok=True)

    def close(self) -> None:
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


def _lock(folder: Path) -> int:
    """Held while this process lives; across containers that share the memory but not the process ids, too."""
    file = os.open(folder / "new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(folder / "new", folder / "lock")  # seen by others only now, so that nobody takes the folder for abandoned
    return file


def _remove_abandoned() -> None:
    """Folders whose owner was killed: they would hold memory until the machine starts again."""
    for folder in SHARED.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or in use, or just being made
            file = os.open(folder / "lock", os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(file)
