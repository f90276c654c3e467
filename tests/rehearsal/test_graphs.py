"""Replayed graphs use the memory that they were recorded with and need nothing else; what would go wrong on CUDA is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.reference import engine, prompt
from tests.engine.test_laws import picture
from tests.rehearsal.cuda import Rehearsal
from tests.rehearsal.device import DeviceError, Graph
from tests.rehearsal.engines import Rig, num_recorded, same, serve
from vlserve.config import SamplingParams
from vlserve.engine.cuda_graphs import CudaRecorder, Work
from vlserve.kernels.norms import rms_norm

OPTIONS: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 12, "max_model_len": 32, "block_size": 8}


@pytest.fixture
def card(rig: Rig) -> Rehearsal:
    return rig.card


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every replay is compared with what would be recorded in its place."""
    record, replayed = CudaRecorder.record, list[str]()

    def recorded(recorder: CudaRecorder, work: Work) -> Work:
        replay: Any = record(recorder, work)

        def replay_and_compare() -> None:
            replay()
            now = Graph()
            with torch.cuda.graph(now):
                work()
            replay.__self__.check_same(now)
            replayed.append(work.__qualname__)

        return replay_and_compare

    monkeypatch.setattr(CudaRecorder, "record", recorded)
    yield replayed


def test_replays_of_an_engine_do_what_would_be_recorded_now(rig: Rig, tiny: Path, checked: list[str]) -> None:
    """Decode steps and pictures, whose first steps are not replays."""
    ours = rig.engine(tiny, **OPTIONS)
    asked = [(prompt(tiny, "Why?"[i:], [picture(i, (14, 14))]), SamplingParams(logprobs=2), 4 - i) for i in range(4)]
    cpu = engine(tiny, device="cpu", **OPTIONS)
    for some in (asked[:3], asked[3:]):
        same(rig.serve(ours, some), serve(cpu, some))
    assert num_recorded(ours) > 2 and len(set(checked)) == 2


def record(work: Callable[[], object]) -> Graph:
    graph = Graph()
    with torch.cuda.graph(graph):  # type: ignore[arg-type]
        work()
    return graph


def test_recording_does_no_work(card: Rehearsal) -> None:
    given = torch.zeros(3, device="cuda")
    graph = record(lambda: given.add_(1))
    assert given.cpu().tolist() == [0.0] * 3
    graph.replay()
    assert given.cpu().tolist() == [1.0] * 3


def test_a_number_of_the_host_that_changes_is_found(card: Rehearsal) -> None:
    x, weight, eps = torch.ones(2, 8, device="cuda"), torch.ones(8, device="cuda"), [1e-6]

    def work() -> None:
        x.copy_(rms_norm(x, weight, eps[0]))

    graph = record(work)
    graph.check_same(record(work))
    eps[0] = 1e-3
    with pytest.raises(DeviceError, match=r"a replay does .*1e-06.* is now .*0\.001"):
        graph.check_same(record(work))


def test_a_tensor_of_the_host_that_changes_is_found(card: Rehearsal) -> None:
    x, scale = torch.ones(2, device="cuda"), torch.tensor(2.0)
    graph = record(lambda: x.mul_(scale))
    scale.fill_(3)
    with pytest.raises(DeviceError, match=r"2\.0.* is now .*3\.0"):
        graph.check_same(record(lambda: x.mul_(scale)))
    with pytest.raises(DeviceError, match="operands on cpu"):
        record(lambda: x.mul_(torch.ones(2)))


def test_a_tensor_that_is_bound_anew_is_found(card: Rehearsal) -> None:
    held = [torch.ones(2, device="cuda")]
    out = torch.zeros(2, device="cuda")

    def work() -> None:
        out.copy_(held[0] * 2)

    graph = record(work)
    before = held[0]
    held[0] = torch.ones(2, device="cuda")  # where it should have been written into
    with pytest.raises(DeviceError, match="is now"):
        graph.check_same(record(work))
    graph.replay()
    del before  # and now its memory is somebody else's
    with pytest.raises(DeviceError, match="freed since it was recorded, at tests/rehearsal/test_graphs.py"):
        graph.replay()


def test_what_lies_otherwise_is_found(card: Rehearsal) -> None:
    """The same memory, read with other strides."""
    held, out = [torch.ones(2, 2, device="cuda")], torch.zeros(2, 2, device="cuda")
    graph = record(lambda: out.copy_(held[0]))
    held[0] = held[0].t()
    with pytest.raises(DeviceError, match=r"\(2, 1\).* is now .*\(1, 2\)"):
        graph.check_same(record(lambda: out.copy_(held[0])))


def test_what_a_graph_keeps_for_itself_is_not_read_elsewhere(card: Rehearsal) -> None:
    x, kept = torch.ones(2, device="cuda"), list[torch.Tensor]()
    graph = record(lambda: kept.append(x + 1))
    graph.replay()
    with pytest.raises(DeviceError, match="uses what a graph keeps for itself"):
        kept[0].sum()


def test_a_replay_that_allocates_or_waits_is_found(card: Rehearsal) -> None:
    x = torch.ones(2, device="cuda")
    graph = record(lambda: x.add_(1))
    graph.steps.append(lambda: torch.ones(2, device="cuda"))  # type: ignore[arg-type, return-value]
    with pytest.raises(DeviceError, match="a replay allocates memory"):
        graph.replay()
    with pytest.raises(DeviceError, match="_local_scalar_dense while a graph is recorded"):
        record(lambda: x.mul_(x.sum().item()))
