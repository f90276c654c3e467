"""Preprocessed pictures in shared memory, where every rank of this machine can map them.

A file is there while a request that needs it is open. Where shared memory is missing or full, files of an ordinary folder serve.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

from vlserve.engine.messages import pixel_file
from vlserve.errors import OverloadedError
from vlserve.ranks.private_folders import PrivateFolder

SHARED = Path("/dev/shm")


class PixelFiles:
    """`put` and `release` are thread-safe and count the users of each picture."""

    def __init__(self, fallback: Path) -> None:
        self.folders = [fallback / "pixels"]
        self.folders[0].mkdir()
        self._shared: PrivateFolder | None = None
        with contextlib.suppress(OSError):  # missing, read-only or full
            self._shared = PrivateFolder(SHARED)
            self.folders.insert(0, self._shared.path)
        self._users: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    def put(self, digest: bytes, content: memoryview) -> None:
        """The units as plain bytes; raises OverloadedError when there is no room for them."""
        with self._lock:
            self._users[digest] += 1
            if self._users[digest] > 1:
                return
            for folder in self.folders:
                path = folder / pixel_file(digest)
                try:
                    with path.open("wb") as file:
                        if hasattr(os, "posix_fallocate"):  # a full file system says so here, not by a signal when it is mapped
                            os.posix_fallocate(file.fileno(), 0, content.nbytes)
                        file.write(content)
                    return
                except OSError:
                    path.unlink(missing_ok=True)
            del self._users[digest]
        where = " and ".join(str(folder.parent) for folder in self.folders)
        raise OverloadedError(f"there is no room for the picture in {where}; try again later, or send fewer pictures at once")

    def release(self, digest: bytes) -> None:
        with self._lock:
            self._users[digest] -= 1
            if self._users[digest] <= 0:
                del self._users[digest]
                for folder in self.folders:
                    (folder / pixel_file(digest)).unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.folders[-1], ignore_errors=True)
        if self._shared is not None:
            self._shared.close()
