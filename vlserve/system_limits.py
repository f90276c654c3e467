"""What the operating system refuses: its limits raised at start, and its errors told apart.

A client hears the reason, without paths. The log has the whole error and the way out.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator

from vlserve.errors import EngineError

log = logging.getLogger(__name__)
OPEN_FILES = 65536  # asked for: sockets, pictures and models take far fewer
MORE_FILES = "allow more (ulimit -n 65536, systemd's LimitNOFILE, docker run --ulimit nofile=65536)"
# errno: (the reason, the way out)
REFUSALS = {
    errno.EMFILE: ("the server has too many files and connections open", MORE_FILES),
    errno.ENFILE: ("the machine has too many files open", "raise fs.file-max, or end what holds them"),
    errno.ENOSPC: ("the server's file system is full", "free some room, or give more (docker run --shm-size=8g; TMPDIR)"),
    errno.EDQUOT: ("the server's share of its file system is used up", "raise the quota, or set TMPDIR to another file system"),
    errno.ENOMEM: ("the server is out of memory", "give it more, or allow less at once (--max-queue, --media-workers)"),
    errno.ENOBUFS: ("the server is out of memory for connections", "see the system's limits for sockets"),
}
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def raise_open_files() -> None:
    """Raise this process's soft limit of open files as far as it may, up to OPEN_FILES; children inherit it."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has another bound, which it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def find_refusal(error: BaseException) -> int | None:
    """The errno, a key of REFUSALS, that an error comes from, whatever it was wrapped in; None where it has another cause."""
    for cause in _causes(error):
        if isinstance(cause, MemoryError):
            return errno.ENOMEM
        number = getattr(cause, "errno", None)
        if number in REFUSALS:
            return int(number)
    return None


def describe(error: BaseException) -> str:
    """For who runs the server: the reason and the way out; of other errors, their text without paths."""
    number = find_refusal(error)
    if number is not None:
        return "; ".join(REFUSALS[number])
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def refused(error: BaseException, what: str) -> EngineError | None:
    """The error for a client, when the system's limits are the cause; the log hears that `what` failed, why, and the way out.

    An error's own path is left out, since a client may have sent it. Raise it `from None`.
    """
    number = find_refusal(error)
    if number is None:
        return None
    reason, way_out = REFUSALS[number]
    log.error("%s failed: %s (%s); %s", what, reason, os.strerror(number), way_out)
    return EngineError(f"{reason}; try again later")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, groups taken apart."""
    left, seen = [error], set[int]()
    while left:
        cause = left.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        left += [found for found in (cause.__cause__, cause.__context__) if found is not None]
        left += getattr(cause, "exceptions", ())
