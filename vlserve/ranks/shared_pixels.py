"""Preprocessed pictures in shared memory, where every rank of this machine can map them.

A file is there while a request that needs it is open. Where shared memory is missing or full, files of an ordinary folder serve.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

from vlserve.engine.messages import pixel_file
from vlserve.errors import EngineError
from vlserve.ranks.private_folders import PrivateFolder
from vlserve.system_limits import DENIED, refused

log = logging.getLogger(__name__)
SHARED = Path("/dev/shm")
# another folder may still do
OF_THE_FOLDER = (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, *DENIED)


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
        """The units as plain bytes; raises EngineError when the system does not take them, and says in the log why."""
        with self._lock:
            self._users[digest] += 1
            if self._users[digest] > 1:
                return
            try:
                self._write(pixel_file(digest), content)
            except OSError as error:
                del self._users[digest]
                raise refused(error, f"keeping a picture in {' or '.join(map(str, self.folders))}") or _not_kept(error) from None

    def _write(self, name: str, content: memoryview) -> None:
        """Into the first folder that takes it; raises the last one's OSError."""
        for folder in self.folders:
            path = folder / name
            try:
                with path.open("wb") as file:
                    if hasattr(os, "posix_fallocate"):  # a full file system says so here, not by a signal when it is mapped
                        os.posix_fallocate(file.fileno(), 0, content.nbytes)
                    file.write(content)
                return
            except OSError as error:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                if error.errno not in OF_THE_FOLDER or folder == self.folders[-1]:
                    raise

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


def _not_kept(error: OSError) -> EngineError:
    """For what is no limit of the system: rights, a folder that somebody removed, a faulty disk."""
    log.error("a picture could not be kept for the ranks: %s; see that the folder is there and may be written", error)
    return EngineError("the server cannot keep pictures; its log says more")
