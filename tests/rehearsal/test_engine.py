"""Whole engines on a card that is not there: they answer as the CPU does, and wait for the device only where that is meant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.reference import add, engine, prompt
from tests.engine.test_laws import picture
from tests.rehearsal.cuda import Rehearsal
from tests.rehearsal.device import DeviceError
from tests.rehearsal.engines import READ, Asked, Rig, num_recorded, same, serve, waits
from vlserve.config import SamplingParams
from vlserve.engine.engine import Engine

LOGPROBS = SamplingParams(logprobs=2)
# prompts take two steps, and the KV cache has 8 blocks, which are too few for four requests
OPTIONS: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 12, "max_model_len": 48, "block_size": 8}
OPTIONS["kv_cache_gib"] = 8 * 2048 / 2**30


@pytest.fixture(scope="module")
def ours(rig: Rig, tiny: Path) -> Engine:
    """With graphs, and steps that are scheduled while the one before them runs."""
    rig.card.shared.waits.clear()
    made = rig.engine(tiny, **OPTIONS)
    places = {place.rpartition(" at ")[2] for place in waits(rig.card)}
    # of files that are mapped, and of the table of positions: before anything is served
    assert places == {"vlserve/llm/weights.py", "vlserve/llm/decoder.py"}
    assert made.overlaps and made.runner.decodes is not None and made.runner.num_blocks == 8
    return made


@pytest.fixture(scope="module")
def cpu(tiny: Path) -> Engine:
    return engine(tiny, device="cpu", **OPTIONS)


@pytest.fixture(scope="module")
def asked(tiny: Path) -> list[Asked]:
    texts = [prompt(tiny, "Who are you?"), prompt(tiny, "Why?"), prompt(tiny, "What shape is it? A red circle.")]
    wide, square = picture(1, (28, 14)), picture(2, (14, 14))  # three tiles and one
    pictures = [prompt(tiny, "How many?", [square]), prompt(tiny, "It is", [wide, square])]
    return [(one, LOGPROBS, 12 - 2 * i) for i, one in enumerate([*pictures, *texts])]


def test_requests_in_company_answer_as_on_the_cpu(rig: Rig, ours: Engine, cpu: Engine, asked: list[Asked]) -> None:
    """Pictures, prefills in several steps beside decodes, more requests than a step takes, and one that gives up its blocks."""
    got = rig.serve(ours, asked)
    same(got, serve(cpu, asked))
    assert ours.scheduler.num_preemptions > 0
    assert num_recorded(ours) > 3 and ours.runner.image_queries == 3
    assert sum(ours.runner.device_bytes().values()) == rig.card.memory().now


def test_what_is_cached_is_not_computed_again(rig: Rig, ours: Engine, cpu: Engine, asked: list[Asked], tiny: Path) -> None:
    """Blocks of a prefix that was seen, and features of a picture whose blocks were not kept."""
    same(rig.serve(ours, asked[1:2]), serve(cpu, asked[1:2]))
    before = ours.runner.image_queries, ours.runner.image_hits
    again = rig.serve(ours, asked[1:2])
    same(again, serve(cpu, asked[1:2]))
    assert again[0][-1].cached_tokens >= 8
    other = [(prompt(tiny, "So", [picture(2, (14, 14))] * 2), LOGPROBS, 2)]  # a picture that was seen elsewhere
    same(rig.serve(ours, other), serve(cpu, other))
    assert ours.runner.image_queries - before[0] == ours.runner.image_hits - before[1] > 0


def test_aborted_while_a_step_is_open(rig: Rig, ours: Engine, cpu: Engine, asked: list[Asked]) -> None:
    """And asked again under the same id; afterwards the engine has nothing to do."""

    def again(engine: Engine) -> None:
        assert (engine._open is not None) == engine.overlaps
        assert [event.finish_reason for event in engine.abort([0])] == ["abort"]
        add(engine, 0, *asked[3])

    chosen = [asked[2], asked[4]]
    got = rig.serve(ours, chosen, lambda: again(ours))
    want = serve(cpu, chosen, lambda: again(cpu))
    same({1: got[1]}, {1: want[1]})
    same({0: got[0][-asked[3][2] :]}, {0: want[0][-asked[3][2] :]})
    rig.card.shared.waits.clear()
    ours.runner.idle()
    assert not ours.has_work and not ours.step() and not rig.card.shared.waits


def test_without_graphs_and_one_step_after_another(rig: Rig, tiny: Path, cpu: Engine, asked: list[Asked]) -> None:
    plain = rig.engine(tiny, **OPTIONS, enforce_eager=True, overlap=False, prefix_caching=False, vision_cache_gib=0)
    assert not plain.overlaps and plain.runner.decodes is None
    same(rig.serve(plain, asked), serve(cpu, asked))
    assert num_recorded(plain) == 0 and plain.runner.features.num_bytes == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
def test_what_overflows_ends_with_an_error_and_others_go_on(rig: Rig, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "overflowing"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("multi_modal_projector.linear_2.weight"))
    weights[name] = weights[name] / weights[name].abs().max() * 60_000
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    half = rig.engine(folder, **OPTIONS, dtype="float16")
    drawn = SamplingParams(temperature=1.5, top_k=20, top_p=0.9, seed=3, logit_bias={4: 2.0})
    seen, text = prompt(folder, "How many?", [picture(1, (14, 14))]), prompt(folder, "Why?")
    got = rig.serve(half, [(seen, LOGPROBS, 4), (seen, drawn, 4), (text, LOGPROBS, 4)])
    assert [event.finish_reason for id in (0, 1) for event in got[id]] == ["error", "error"]
    assert all("float16 that are not finite" in str(got[id][0].error) for id in (0, 1))
    assert len(got[2]) == 4 and got[2][-1].finish_reason == "length"


def test_a_read_is_once_for_each_step(rig: Rig, ours: Engine, asked: list[Asked]) -> None:
    """The reads that `serve` expects are those of steps, not of requests."""
    steps, start = 0, ours.runner.start

    def counted(chunks: Any) -> Any:
        nonlocal steps
        steps += any(chunk.samples for chunk in chunks)
        return start(chunks)

    ours.runner.start = counted  # type: ignore[method-assign]
    try:
        rig.serve(ours, asked[2:4])
    finally:
        ours.runner.start = start  # type: ignore[method-assign]
    assert waits(rig.card)[READ] == steps


def test_faults_are_found(rig: Rig) -> None:
    """The rehearsal would tell of a hidden read, of operands on two devices, and of what a graph cannot record."""
    card = rig.card
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
