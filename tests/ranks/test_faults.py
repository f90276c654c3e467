"""The fault table: whatever befalls a rank, all of them end soon, with one error that names rank, place and way out.

`pytest -s` prints a line for each fault: seconds until the error (deadlines included), and its text.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.ranks.faults import (
    Clock,
    OtherMachine,
    add_path,
    has_stage,
    other_machine,
    pipeline,
    ranks_of,
    wait_for_stage,
    write_plugin,
)
from tests.settling import eventually, wait_until
from tests.vision.test_preprocess import noise
from vlserve import EngineError, VLPipeline
from vlserve.engine.messages import STAGES, Step

LIMIT_S = 4
Hold = Callable[..., None]
pytestmark = pytest.mark.usefixtures("places")


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """A checkpoint whose rank 1 fails in the way that is given when it encodes a picture."""

    def make(kind: str) -> Path:
        site, folder = write_plugin(tmp_path / "site", checkpoint("qwen2"))
        monkeypatch.syspath_prepend(site)
        add_path(monkeypatch.setenv, site)
        monkeypatch.setenv("VLSERVE_STEP", kind)
        return folder

    return make


def tighten(pipe: VLPipeline, **limits: float) -> None:
    """Short deadlines from here on; importing torch on a busy machine would not meet them."""
    pipe.client.config = replace(pipe.client.config, **limits)


def check_refused(pipe: VLPipeline, text: str) -> None:
    with pytest.raises(EngineError, match=re.escape(text)):
        pipe("hi")


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_a_rank_killed_while_loading(stage: str, hold: Hold, checkpoint: Callable[..., Path]) -> None:
    hold(stage)
    with pipeline(checkpoint("qwen2")) as pipe:
        wait_for_stage(pipe, 1, stage)
        rank = ranks_of(os.getpid())[1]
        clock = Clock(f"rank 1 killed in stage {stage!r}")
        rank.kill()
        text = clock.wait_error(pipe, limit_s=0)
        assert "rank 1 ended (killed by signal 9)" in text and f"in stage {stage!r}" in text and "dmesg" in text
        check_refused(pipe, text)


@pytest.mark.parametrize("stage,limit", [("all-reduce", "rendezvous_timeout_s"), ("weights", "load_timeout_s")])
def test_a_rank_stopped_while_loading(stage: str, limit: str, hold: Hold, checkpoint: Callable[..., Path]) -> None:
    hold(stage)
    with pipeline(checkpoint("qwen2")) as pipe:
        wait_for_stage(pipe, 1, stage)
        ranks_of(os.getpid())[1].suspend()
        clock = Clock(f"rank 1 stopped in stage {stage!r}")
        tighten(pipe, **{limit: LIMIT_S})
        text = clock.wait_error(pipe, limit_s=LIMIT_S)
        assert "rank 1 is stopped" in text and f"stage {stage!r}" in text and limit in text
        check_refused(pipe, text)


def test_a_rank_that_never_joins(hold: Hold, checkpoint: Callable[..., Path]) -> None:
    hold("imports")
    with pipeline(checkpoint("qwen2"), rendezvous_timeout_s=LIMIT_S) as pipe:
        wait_for_stage(pipe, 0, "rendezvous")
        clock = Clock("rank 1 never joins")
        text = clock.wait_error(pipe, limit_s=LIMIT_S)
        assert f"rank 1 did not join within rendezvous_timeout_s={LIMIT_S}" in text and text.count("stage") == 1
        check_refused(pipe, text)


def test_a_rank_that_hangs_while_loading(hold: Hold, checkpoint: Callable[..., Path]) -> None:
    hold("warm-up")
    with pipeline(checkpoint("qwen2")) as pipe:
        wait_for_stage(pipe, 1, "warm-up")
        clock = Clock("rank 1 hangs in stage 'warm-up'")
        tighten(pipe, load_timeout_s=LIMIT_S)
        text = clock.wait_error(pipe, limit_s=LIMIT_S)
        assert "rank 1 is furthest behind" in text and "waits in the collective 'warm-up'" in text and "load_timeout_s" in text


def test_a_rank_out_of_memory_while_loading(hold: Hold, checkpoint: Callable[..., Path]) -> None:
    hold("kv cache", kind="memory")
    with pipeline(checkpoint("qwen2")) as pipe:
        wait_until(lambda: pipe.client.error is not None or has_stage(pipe, 1, "kv cache"))
        text = Clock("rank 1 out of memory in stage 'kv cache'").wait_error(pipe, limit_s=0)
        assert text.startswith("rank 1, stage 'kv cache': out of memory; try a smaller kv_cache_gib")


def begin(pipe: VLPipeline) -> tuple[Iterator[Any], psutil.Process]:
    """A stream that has begun and would go on for a while, and rank 1, which is not quickly found on a busy machine."""
    pipe.wait_ready()
    rank = ranks_of(os.getpid())[1]
    deltas = iter(pipe.stream("hi", max_tokens=480, ignore_eos=True))
    next(deltas)
    return deltas, rank


def wait_for_its_absence(pipe: VLPipeline) -> None:
    """Until rank 0 waits for a rank that was stopped, and not only for one that is slow."""
    status = pipe.client._ranks._status
    seen: list[tuple[int, str]] = []

    def read() -> list[tuple[int, str]]:
        first = status.read()[0]
        seen.append((first.number, first.kind))
        return seen

    eventually(read, lambda seen: seen[-1][1] and len(seen) >= 10 and len(set(seen[-10:])) == 1, "rank 0 waits in a collective")


def test_a_request_sent_before_rank_0_listens_is_not_lost_and_a_rank_killed_in_a_step(
    hold: Hold, checkpoint: Callable[..., Path]
) -> None:
    hold("Ready", rank=0, kind="pause")
    with pipeline(checkpoint("qwen2"), step_timeout_s=60) as pipe:
        pipe.wait_ready()
        assert len(pipe("hi", max_tokens=2, ignore_eos=True).token_ids) == 2
        deltas, rank = begin(pipe)
        clock = Clock("rank 1 killed in decoding")
        rank.kill()
        with pytest.raises(EngineError) as error:
            list(deltas)
        text = clock.stop(str(error.value), limit_s=0)
        assert "rank 1 ended (killed by signal 9)" in text
        check_refused(pipe, text)


def test_a_rank_stopped_in_a_step(checkpoint: Callable[..., Path]) -> None:
    with pipeline(checkpoint("qwen2"), step_timeout_s=LIMIT_S) as pipe:
        deltas, rank = begin(pipe)
        rank.suspend()
        clock = Clock("rank 1 stopped in decoding")
        with pytest.raises(EngineError) as error:
            list(deltas)
        text = clock.stop(str(error.value), limit_s=LIMIT_S)
        assert f"more than step_timeout_s={LIMIT_S} s" in text and "rank 1 is stopped" in text


def test_requests_that_leave_do_not_hide_a_rank_that_hangs(checkpoint: Callable[..., Path]) -> None:
    with pipeline(checkpoint("qwen2"), step_timeout_s=LIMIT_S) as pipe:
        deltas, rank = begin(pipe)
        rank.suspend()
        wait_for_its_absence(pipe)
        clock = Clock("rank 1 stopped, and its client leaves")
        deltas.close()  # type: ignore[attr-defined]
        wait_until(lambda: not pipe.client._streams, "the ranks are told that the client left")
        late = Step(events=[], stats=pipe.client.stats, num_taken=1)  # of the step before, and read only now
        pipe.client._handle(late, *[None] * 3)
        assert "step_timeout_s" in clock.wait_error(pipe, limit_s=LIMIT_S)


@pytest.mark.parametrize(
    "kind,limit,message",
    [
        ("memory", 0, "rank 1, in a step: out of memory; try"),
        ("hang", LIMIT_S, "rank 1 is furthest behind.*rank 0.*waits in the collective 'features'.*rank 1.* computes"),
    ],
)
def test_a_rank_that_fails_in_a_step(kind: str, limit: int, message: str, faulty: Callable[[str], Path]) -> None:
    with pipeline(faulty(kind), step_timeout_s=60) as pipe:
        pipe.wait_ready()
        clock = Clock({"memory": "rank 1 out of memory in a step", "hang": "rank 1 hangs in a step"}[kind])
        tighten(pipe, step_timeout_s=LIMIT_S)
        with pytest.raises(EngineError) as error:
            pipe(("What?", Image.fromarray(noise(30, 120))), max_tokens=4)
        assert re.match(f"(?s).*{message}", clock.stop(str(error.value), limit_s=limit))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def machine(folder: Path, number: int, port: int, **options: Any) -> Any:
    several = {"nnodes": 2, "node_rank": number, "rdzv_endpoint": f"127.0.0.1:{port}"}
    start = pipeline if number == 0 else other_machine
    return start(folder, **{**several, "rendezvous_timeout_s": 60, **options})


def wait_rendezvous(*pipes: VLPipeline | OtherMachine) -> None:
    """Until every machine's ranks have met, or given up; importing torch is no part of a fault."""
    for pipe in pipes:
        wait_until(lambda pipe=pipe: pipe.client.error is not None or pipe.client.stage.name == "rendezvous")


def test_machines_with_different_sizes(checkpoint: Callable[..., Path]) -> None:
    port = free_port()
    with machine(checkpoint("qwen2"), 0, port) as first, machine(checkpoint("qwen2"), 1, port, tp=4) as second:
        wait_rendezvous(first, second)
        clock = Clock("two machines, --tp 2 and --tp 4")
        for pipe in (first, second):  # whichever saw it first told the others
            said = clock.wait_error(pipe, limit_s=0)
            assert re.search(r"was not started like this one: tp is (2 here and 4|4 here and 2) there", said)


def test_two_machines_with_the_same_number(checkpoint: Callable[..., Path]) -> None:
    port, folder = free_port(), checkpoint("qwen2")
    with machine(folder, 0, port), machine(folder, 1, port) as second, machine(folder, 1, port) as third:
        clock = Clock("two machines with the same node_rank")
        wait_until(lambda: (second.client.error or third.client.error) is not None, "one of them fails")
        text = clock.stop(str(second.client.error or third.client.error), limit_s=60)
        assert "rank 1 was started twice: give each machine a node_rank of its own, 0 to 1" in text


def test_machines_with_different_checkpoints(checkpoint: Callable[..., Path]) -> None:
    port = free_port()
    with machine(checkpoint("qwen2"), 0, port) as first, machine(checkpoint("qwen2", seed=7), 1, port) as second:
        wait_rendezvous(first, second)
        clock = Clock("two machines, different checkpoints")
        for pipe in (first, second):
            assert re.search(r"was not started like this one: checkpoint is \w+ here", clock.wait_error(pipe, limit_s=0))


def test_a_rendezvous_port_that_is_taken(checkpoint: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:  # takes connections and says nothing
        port = other.getsockname()[1]
        options = {"rendezvous_timeout_s": LIMIT_S}
        with (
            machine(checkpoint("qwen2"), 0, port, **options) as first,
            machine(checkpoint("qwen2"), 1, port, **options) as second,
        ):
            wait_rendezvous(first)
            text = Clock("the rendezvous port is taken").wait_error(first, limit_s=0)
            assert f"cannot listen on rdzv_endpoint 127.0.0.1:{port}: Address already in use" in text
            wait_rendezvous(second)
            text = Clock("something else answers at the rendezvous port").wait_error(second, limit_s=LIMIT_S + 5)
            assert "rendezvous" in text and "rank 1" in text


def test_a_machine_that_is_killed(checkpoint: Callable[..., Path]) -> None:
    port = free_port()
    with machine(checkpoint("qwen2"), 0, port) as first, machine(checkpoint("qwen2"), 1, port) as second:
        deltas, rank = begin(first)
        second.wait_ready()
        clock = Clock("the other machine's rank killed")
        rank.kill()
        with pytest.raises(EngineError) as error:
            list(deltas)
        assert "rank 0 waited for the other ranks in" in clock.stop(str(error.value), limit_s=2)
        clock.wait_error(second, limit_s=0)


def test_starts_and_stops_leave_nothing(checkpoint: Callable[..., Path], places: Path) -> None:
    """Threads end after `close` returns, and close files of theirs when they do."""

    others = set(threading.enumerate())

    def threads() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name.startswith("vlserve") and one not in others]

    def start_and_stop() -> None:
        with pipeline(checkpoint("qwen2")) as pipe:
            pipe.wait_ready()
            assert pipe("hi", max_tokens=2).token_ids
        wait_until(lambda: not ranks_of(os.getpid()), "the ranks end")
        eventually(lambda: list(places.glob("vlserve-*")), lambda left: not left, "the folders are removed")
        eventually(threads, lambda left: not left, "the threads end")

    start_and_stop()  # opens what the whole process keeps
    before = psutil.Process().num_fds()
    start_and_stop()
    eventually(psutil.Process().num_fds, lambda now: now <= before, f"as few open files as before, {before}", seconds=20)
