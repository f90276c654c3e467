"""Makes ranks fail in a chosen place, and sees what is left afterwards. The product has no hooks for it: a start-up module of
Python's (`sitecustomize`) holds a rank in a stage, a plug-in model fails in a step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.checkpoints import edit_json
from tests.prompt.test_build import copy_of
from tests.settling import is_alive, wait_until
from vlserve import EngineConfig, VLPipeline
from vlserve.ranks.supervisor import Supervisor

GRACE_S = 60  # beyond its deadline, for a fault to be noticed and everything to end
MARK = "VLSERVE_TEST"  # in the environment of all processes of one test
PAIR: dict[str, Any] = {"tp": 2, "device": "cpu", "dtype": "float32", "kv_cache_gib": 0.05, "threads": 1}

HOLD = """
import os, sys, time
if sys.orig_argv[-2:] == ["-m", "vlserve.rank"] and "VLSERVE_HOLD" in os.environ:
    import msgspec, zmq
    kind, stage, rank = os.environ["VLSERVE_HOLD"].split(",")
    plain = zmq.Socket.send

    def send(self, data, *args, **options):
        result = plain(self, data, *args, **options)
        message = msgspec.msgpack.decode(data)
        if message["type"] in ("Stage", "Ready") and message.get("name", "Ready") == stage and message["rank"] == int(rank):
            if kind == "memory":
                import torch
                torch.empty(2**50, dtype=torch.uint8)
            time.sleep(3 if kind == "pause" else 3600)
        return result

    zmq.Socket.send = send
    if stage == "starting":
        time.sleep(3600)
"""
PLUGIN = """
import dataclasses, os, signal, time
from vlserve.models.registry import BUILT_IN

def build(config, preprocessor, split):
    import torch
    from vlserve.models.internvl import build
    from vlserve.vision.internvit import InternVit

    class Faulty(InternVit):
        num_calls = 0

        def features(self, x):
            self.num_calls += 1
            if self.num_calls > 1 and split.group.rank == 1:  # the first is the warm-up's
                kind = os.environ["VLSERVE_STEP"]
                if kind == "memory":
                    torch.empty(2**50, dtype=torch.uint8)
                elif kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif kind == "hang":
                    time.sleep(3600)
            return super().features(x)

    model = build(config, preprocessor, split)
    model.tower.__class__ = Faulty
    return model

ARCHITECTURE = dataclasses.replace(BUILT_IN["internvl"], build=build)
"""


def write_hold(folder: Path) -> Path:
    """A folder for PYTHONPATH; VLSERVE_HOLD=kind,stage,rank says where a rank stays (kind: sleep, pause or memory)."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOLD)
    return folder


def write_plugin(folder: Path, checkpoint: Path) -> tuple[Path, Path]:
    """A folder for PYTHONPATH and a checkpoint, whose rank 1 does VLSERVE_STEP (memory, kill, hang) when it encodes a picture."""
    info = folder / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlserve.models]\nfaulty = faulty:ARCHITECTURE\n")
    (folder / "faulty.py").write_text(PLUGIN)
    copy = copy_of(checkpoint, folder)
    edit_json(copy / "config.json", model_type="faulty")
    return folder, copy


def ranks_of(pid: int) -> list[psutil.Process]:
    """The rank processes of a front, rank 0 first."""
    found = [p for p in psutil.Process(pid).children(recursive=True) if _is_rank(p)]
    return sorted(found, key=lambda p: (p.create_time(), p.pid))


def marked_ranks(mark: str) -> list[psutil.Process]:
    """Rank processes of one test, orphans too."""
    return [p for p in psutil.process_iter() if _is_rank(p) and _environment(p).get(MARK) == mark]


def own_folders(pid: int) -> list[Path]:
    """The private folders that a front holds."""
    files = [Path(file.path) for file in psutil.Process(pid).open_files()]
    return [file.parent for file in files if file.name == "vlserve.lock"]


def has_stage(pipe: VLPipeline, rank: int, name: str) -> bool:
    assert pipe.client.error is None, pipe.client.error
    return any(stage.rank == rank and stage.name == name for stage, _ in pipe.client.rank_stages)


def wait_for_stage(pipe: VLPipeline, rank: int, name: str) -> None:
    wait_until(lambda: has_stage(pipe, rank, name), f"rank {rank} in stage {name!r}")


class Clock:
    """Measures from the fault on and prints a line of the table."""

    def __init__(self, fault: str) -> None:
        self.fault, self.begun = fault, time.monotonic()

    def stop(self, text: str, *, limit_s: float) -> str:
        seconds = time.monotonic() - self.begun
        print(f"\nFAULT | {self.fault} | {seconds:.1f} s | {text}")
        assert seconds < limit_s + GRACE_S, f"{self.fault}: {seconds:.1f} s, allowed are {limit_s} + {GRACE_S}"
        return text

    def wait_error(self, pipe: VLPipeline | OtherMachine, *, limit_s: float) -> str:
        """Until the pipeline has failed for good."""
        wait_until(lambda: pipe.client.error is not None, f"an error after {self.fault}")
        return self.stop(str(pipe.client.error), limit_s=limit_s)


class OtherMachine:
    """A machine above 0: ranks and no answers."""

    def __init__(self, config: EngineConfig) -> None:
        self.client = Supervisor(config)
        self.client.start()

    def wait_ready(self) -> None:
        self.client.wait_ready()


@contextmanager
def other_machine(folder: Path, **options: Any) -> Iterator[OtherMachine]:
    machine = OtherMachine(EngineConfig(model=str(folder), **{**PAIR, **options}))
    try:
        yield machine
    finally:
        machine.client.close()


@contextmanager
def pipeline(folder: Path, **options: Any) -> Iterator[VLPipeline]:
    """A pipeline on two ranks that is loading."""
    pipe = VLPipeline(str(folder), wait=False, **{**PAIR, **options})
    try:
        yield pipe
    finally:
        pipe.close()


def nothing_left(mark: str, *folders: Path) -> None:
    """Every rank ends, and so do the folders."""
    wait_until(lambda: not marked_ranks(mark), "the ranks end")
    for folder in folders:
        wait_until(lambda folder=folder: not list(folder.glob("vlserve-*")), f"{folder} is empty")


def add_path(set_variable: Callable[[str, str], None], folder: Path) -> None:
    set_variable("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))


def _is_rank(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[-1:] == ["vlserve.rank"] and is_alive(process)
    except psutil.Error:
        return False


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
