"""Whole engines on a card that is not there: they answer as the CPU does, and wait for the device only where that is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.reference import engine, prompt
from tests.engine.test_laws import picture
from tests.rehearsal.cuda import Rehearsal
from tests.rehearsal.device import DeviceError
from tests.rehearsal.engines import READ, SMALL, answers, tokens, waits
from tests.rehearsal.launches import Launches
from vlserve.engine.messages import TokenEvent
from vlserve.prompt.build import Prompt


@pytest.fixture
def prompts(checkpoint: Callable[..., Path]) -> list[Prompt]:
    folder = checkpoint("qwen2")
    return [prompt(folder, "How many?", [picture(1)]), prompt(folder, "Who are you?")]


@pytest.fixture
def on_the_cpu(checkpoint: Callable[..., Path], prompts: list[Prompt]) -> dict[int, list[TokenEvent]]:
    return answers(engine(checkpoint("qwen2"), device="cpu", **SMALL), prompts)[0]


def test_it_answers_as_the_cpu_and_waits_once_a_step(
    checkpoint: Callable[..., Path],
    prompts: list[Prompt],
    on_the_cpu: dict[int, list[TokenEvent]],
    card: Rehearsal,
    launches: Launches,
) -> None:
    """With graphs, and steps that are scheduled while the one before them runs."""
    ours = engine(checkpoint("qwen2"), device="cuda", **SMALL)
    assert ours.overlaps and ours.runner.decodes is not None
    card.shared.waits.clear()
    got, steps = answers(ours, prompts)
    assert tokens(got) == tokens(on_the_cpu)
    seen = waits(card)
    recorded = len(ours.runner.decodes.graphs.recorded)
    assert seen.pop(READ) < steps, "the last step reads what was sampled, and starts nothing"
    assert seen == {"torch.cuda.synchronize at vlserve/engine/cuda_graphs.py": recorded + 1}, "one for a picture's graph"
    assert {signature.kernel for signature in launches.signatures} >= {"_attention_kernel", "_rms_kernel", "_layer_kernel"}
    assert sum(ours.runner.device_bytes().values()) == card.memory().now


def test_faults_are_found(card: Rehearsal) -> None:
    """The rehearsal would tell of a hidden read, of operands on two devices, and of what a graph cannot record."""
    there, here = torch.ones(4, device="cuda"), torch.ones(4)
    float(there.sum())
    assert card.shared.waits[-1].startswith("aten::_local_scalar_dense at tests/rehearsal/test_engine.py")
    there[there > 0]
    assert card.shared.waits[-1].startswith("aten::index.Tensor")
    with pytest.raises(DeviceError, match="operands on cpu"):
        there + here
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(DeviceError, match="while a graph is recorded"), torch.cuda.graph(graph):
        here.to("cuda")


def test_copies_that_are_not_waited_for_are_late(card: Rehearsal) -> None:
    """So that a host that reads before it waited, or writes what the device has not read yet, is found."""
    given, taken = torch.arange(4), torch.zeros(4, dtype=torch.int64, pin_memory=False)
    taken.copy_(given.to("cuda") + 1, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    assert taken.tolist() != [1, 2, 3, 4]
    event.synchronize()
    assert taken.tolist() == [1, 2, 3, 4]
    words = torch.tensor([1, 2, 3], pin_memory=True)
    there = words.to("cuda", non_blocking=True)
    words[1] = 7
    with pytest.raises(DeviceError, match="was written before the device had read it.*test_engine"):
        float(there.sum())


def test_a_graph_does_the_work_again_on_the_same_memory(card: Rehearsal) -> None:
    given, taken = torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        taken.copy_((given + 1) * 2)
    before = card.memory().now
    given.fill_(4)
    graph.replay()
    assert taken.cpu().tolist() == [10.0] * 3 and card.memory().now == before
