"""Work in processes of its own, forked, each with a time limit: what hangs, or breaks the device, takes nothing else with it.

A process that broke CUDA cannot use it any more, so nobody else may have computed in it. Forks share what was imported before,
which is most of the time that a fresh interpreter takes; whoever forks must never have touched CUDA itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, LATE = "passed", "failed", "out of time"
POLL_S, DUMP_S = 0.01, 0.3
MOST_REASON = 2000  # bytes


class CheckError(Exception):
    """A result that is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    name: str
    work: Callable[[], None]
    limit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`reason`: the first line of the error, or how the process ended; "" where it passed."""

    status: str
    seconds: float
    reason: str = ""


def run_jobs(jobs: Iterable[Job], log: Path, *, at_once: int = 1, is_nested: bool = False) -> Iterator[tuple[Job, Outcome]]:
    """Each with its outcome, as they end. `log` takes all that they print. Whoever leaves early ends those that run.

    `is_nested`: their processes end with the group of the one that starts them.
    """
    waiting, running = deque(jobs), list[_Process]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Process(waiting.popleft(), log, is_nested))
            for process in list(running):
                outcome = process.poll()
                if outcome is not None:
                    running.remove(process)
                    yield process.job, outcome
            time.sleep(POLL_S)
    finally:
        for process in running:
            process.kill()


class _Process:
    def __init__(self, job: Job, log: Path, is_nested: bool) -> None:
        self.job, self._is_nested, self._begun = job, is_nested, time.monotonic()
        self._reasons, told = os.pipe()
        os.set_blocking(self._reasons, False)
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _be_child(job, log, told, is_nested)
        os.close(told)

    def poll(self) -> Outcome | None:
        """None while it runs within its limit."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        seconds = time.monotonic() - self._begun
        if pid:
            reason = self._end()
            code = os.waitstatus_to_exitcode(status)
            if code == 0:
                return Outcome(status=PASSED, seconds=seconds)
            ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            return Outcome(status=FAILED, seconds=seconds, reason=reason or ended)
        if seconds < self.job.limit_s:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGUSR1)  # it writes where it is
            time.sleep(DUMP_S)
        self.kill()
        return Outcome(status=LATE, seconds=seconds, reason=f"ended at its limit of {self.job.limit_s:.0f} s; the log says where")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._end()

    def _end(self) -> str:
        """What it started and left behind is ended too; the reason that it gave, if any."""
        if not self._is_nested:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signal.SIGKILL)
        reason = b""
        with contextlib.suppress(BlockingIOError):
            reason = os.read(self._reasons, MOST_REASON)
        os.close(self._reasons)
        return reason.decode(errors="replace")


def _be_child(job: Job, log: Path, told: int, is_nested: bool) -> None:
    """Does the work, and never returns."""
    code = 1
    try:
        if not is_nested:
            os.setsid()
        _end_with_parent()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for number in (1, 2):
            os.dup2(out, number)
        sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)
        faulthandler.enable(sys.stderr)
        faulthandler.register(signal.SIGUSR1, sys.stderr)
        job.work()
        code = 0
    except BaseException as error:  # noqa: BLE001  (whatever it is, it is this process's end)
        traceback.print_exc()
        os.write(told, first_line(error).encode()[:MOST_REASON])
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)  # without the parent's exit handlers


def _end_with_parent() -> None:
    """Linux: the kernel kills this process when the one that started it dies."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    return line if isinstance(error, CheckError) else f"{type(error).__name__}: {line}"


def append_row(path: Path, row: dict[str, object]) -> None:
    """A line of JSON, in one write: several processes may do so."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
