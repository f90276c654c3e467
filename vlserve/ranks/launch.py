"""The ranks of this machine as processes: started together, looked after, ended together.

`subprocess.Popen`, and no launcher of torch's: see docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from vlserve.config import EngineConfig
from vlserve.engine.messages import STAGES, Stage, Task
from vlserve.engine.rank_status import RankStatusReader
from vlserve.ranks.rank_process import RankArguments

# read by NCCL and by torch's part of it; what the user set stays
NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a collective that fails ends its process
    "TORCH_FR_BUFFER_SIZE": "2000",  # the flight recorder: the last collectives of each rank ...
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # ... written to a file when one hangs
}
GPU_HINTS = (
    "On GPUs this comes most often from peer-to-peer access (try NCCL_P2P_DISABLE=1; ACS must be off in the BIOS), too little "
    "shared memory (docker run --shm-size=8g), or a driver that does not fit NCCL. `vlserve doctor` checks all of these"
)
KILL_S = 5.0  # more than any process takes to die, unless a driver holds it

log = logging.getLogger(__name__)


class Ranks:
    """Started by the constructor; `folder` is private to this run and new."""

    def __init__(self, config: EngineConfig, folder: Path, pixel_folders: Sequence[Path], task: Task = "serve") -> None:
        self.config, self.folder, self.task = config, folder, task
        self.first = config.node_rank * config.ranks_per_node
        self.numbers = range(self.first, self.first + config.ranks_per_node)
        self.stages = {rank: Stage(name="starting", rank=rank) for rank in self.numbers}
        self.since = dict.fromkeys(self.numbers, time.monotonic())
        self._status = RankStatusReader(folder / "rank_status", len(self.numbers))
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in self.numbers:
                self._processes.append(self._start(rank, [str(path) for path in pixel_folders]))
        except BaseException:
            self.end(wait_s=0)
            raise

    @property
    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in zip(self.numbers, self._processes, strict=True)}

    def find_dead(self) -> tuple[str | None, str | None]:
        """What became of a rank that was killed by a signal, and of one that ended by itself; None where there is none."""
        dead = [(rank, p.returncode) for rank, p in zip(self.numbers, self._processes, strict=True) if p.poll() is not None]
        # NCCL aborts the ranks that lost another one, and a rank that fails has a status above 0: these come last and first
        killed = sorted((entry for entry in dead if entry[1] < 0), key=lambda entry: entry[1] == -signal.SIGABRT)
        left = sorted((entry for entry in dead if entry[1] >= 0), key=lambda entry: entry[1] == 0)
        return (self._tell_end(*killed[0]) if killed else None), (self._tell_end(*left[0]) if left else None)

    def have_ended(self) -> bool:
        """All, and in order."""
        return all(process.poll() == 0 for process in self._processes)

    def saw(self, stage: Stage) -> float | None:
        """Note where a rank is; the seconds that its last stage took, when this is a new one."""
        before, now = self.stages[stage.rank], time.monotonic()
        self.stages[stage.rank] = stage
        if before.name == stage.name:
            return None
        seconds, self.since[stage.rank] = now - self.since[stage.rank], now
        return seconds

    @property
    def slowest(self) -> Stage:
        """Of the stages that the ranks are in, the earliest."""
        return min(self.stages.values(), key=lambda stage: STAGES.index(stage.name))

    def explain_stall(self) -> str:
        """Which rank the others wait for, as far as can be seen from outside."""
        stopped = [rank for rank, pid in self.pids.items() if _is_stopped(pid)]
        if stopped:
            names = " and ".join(map(self._name, stopped))
            return f"{names} is stopped (by SIGSTOP or a debugger); continue or end the process (pid {self.pids[stopped[0]]})"
        places = dict(zip(self.numbers, self._status.read(), strict=True))
        behind = min(self.numbers, key=lambda r: (STAGES.index(self.stages[r].name), places[r].number, bool(places[r].kind)))
        lines = [
            f"{self._name(rank)} in stage {self.stages[rank].name!r}"
            + (f" waits in the collective {place.kind!r}" if place.kind else " computes")
            + (f" since {place.since_s:.0f} s" if place.number else "")
            for rank, place in places.items()
        ]
        culprit = f"{self._name(behind)} is furthest behind. " if len(lines) > 1 else ""
        hint = f". {GPU_HINTS}" if len(lines) > 1 and self.config.device != "cpu" and Path("/dev/nvidiactl").exists() else ""
        return culprit + "; ".join(lines) + hint

    def end(self, *, wait_s: float) -> None:
        """Give them so long to go by themselves, then kill them; returns when all are gone, or cannot be killed."""
        deadline = time.monotonic() + wait_s
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0, deadline - time.monotonic()))
        for process in self._processes:
            if process.poll() is None:
                process.kill()  # also when it is stopped
        deadline = time.monotonic() + KILL_S
        for process in self._processes:
            try:
                process.wait(timeout=max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("process %d does not end, not even by SIGKILL; a driver may hold it (see dmesg)", process.pid)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def _start(self, rank: int, pixel_folders: list[str]) -> subprocess.Popen[bytes]:
        # The package's folder goes last on the path: found when vlserve runs from a checkout without
        # being installed, while nothing else in that folder hides an installed package.
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
        settings = NCCL_SETTINGS | {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(self.folder / "nccl-")}
        if self.config.nnodes == 1:
            settings["NCCL_SOCKET_IFNAME"] = "lo"  # nothing outside this machine need reach them
        with _signals_blocked():
            process = subprocess.Popen(
                [sys.executable, "-m", "vlserve.rank"],
                stdin=subprocess.PIPE,
                env=settings | os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            )
        arguments = RankArguments(
            config=self.config,
            rank=rank,
            folder=str(self.folder),
            pixel_folders=pixel_folders,
            parent=os.getpid(),
            task=self.task,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a rank that died already is noticed soon
            process.stdin.write(msgspec.json.encode(arguments) + b"\n")
            process.stdin.flush()
        return process

    def _tell_end(self, rank: int, code: int) -> str:
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        text = f"the process of {self._name(rank)} ended ({how})" + (
            "" if self._is_ready(rank) else f" in stage {self.stages[rank].name!r}"
        )
        return text + ("; the system may have been out of memory (see dmesg)" if code == -9 else "")

    def _is_ready(self, rank: int) -> bool:
        return self.stages[rank].name == "ready"

    def _name(self, rank: int) -> str:
        return f"rank {rank}" if self.config.tp > 1 else "the engine"


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process started meanwhile has these signals blocked: they may reach the whole group before it can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_stopped(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "Tt"
