"""What ranks say to one another in a step: which collectives, how often and how many bytes, from the config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.ranks import tp_engine
from tests.engine.reference import add, prompt
from tests.engine.test_tensor_parallel import BIASES, EIGHT, ODD, mixed, picture
from vlserve.config import SamplingParams
from vlserve.engine.batch import StepInput
from vlserve.engine.engine import Engine
from vlserve.engine.process_group import BATCH_BYTES, DistributedGroup
from vlserve.engine.runner import Runner
from vlserve.models.checkpoint import read_checkpoint

Figures = dict[str, tuple[int, int]]  # by kind: how many, and their bytes
FLOAT, INTEGER = 4, 8


def figures(runner: Runner) -> Figures:
    assert isinstance(runner.group, DistributedGroup)
    return {kind: (traffic.count, traffic.num_bytes) for kind, traffic in runner.group.traffic.items()}


def since(before: Figures, after: Figures) -> Figures:
    """What was added, without kinds of which there was nothing."""
    found = {kind: tuple(a - b for a, b in zip(after[kind], before.get(kind, (0, 0)), strict=True)) for kind in after}
    return {kind: (count, num_bytes) for kind, (count, num_bytes) in found.items() if count or num_bytes}


def expected(step: StepInput, config: dict[str, Any], tp: int, tokens_per_tile: int) -> Figures:
    """By the design: two sums a layer and one for the embedding; one message; logits and tokens where a row samples."""
    text = config["text_config"]
    rows, sampled = len(step.ids), sum(chunk.samples for chunk in step.chunks)
    hidden = rows * text["hidden_size"] * FLOAT
    layers = text["num_hidden_layers"]
    found = {"batch": (1, BATCH_BYTES), "embedding": (1, hidden)}
    found |= dict.fromkeys(("o_proj", "down_proj"), (layers, layers * hidden))
    if sampled:
        vocabulary = -(-text["vocab_size"] // tp)
        found |= {"logits": (1, sampled * vocabulary * FLOAT), "tokens": (1, sampled * INTEGER)}
    num_tiles = sum(len(task.units) for task in step.encode)
    if num_tiles:
        share = -(-num_tiles // tp)
        found["features"] = (1, share * tokens_per_tile * text["hidden_size"] * FLOAT)
    return found


def watch(ours: Engine, monkeypatch: pytest.MonkeyPatch) -> list[StepInput]:
    """The steps that rank 0 computes from here on."""
    steps: list[StepInput] = []
    compute = ours.runner._compute

    def noting(step: StepInput) -> Any:
        steps.append(step)
        return compute(step)

    monkeypatch.setattr(ours.runner, "_compute", noting)
    return steps


@pytest.mark.parametrize(
    "tp,settings", ((2, ODD), (4, EIGHT | ODD), (2, {"num_hidden_layers": 1}), (3, {"num_key_value_heads": 3}))
)
def test_every_step_takes_what_the_design_says(
    tp: int, settings: dict[str, Any], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama", **BIASES, **settings)
    read = read_checkpoint(folder)
    kinds: Counter[str] = Counter()
    tokens_per_tile = read.preprocessor.features_per_unit()
    assert tokens_per_tile is not None
    with tp_engine(folder, tp, max_num_batched_tokens=11, block_size=4) as (ours, runners):
        steps = watch(ours, monkeypatch)
        for i, p in enumerate(mixed(folder)):
            add(ours, i, p, SamplingParams(), 6)
        while ours.has_work:
            before = figures(ours.runner)
            ours.step()
            found = since(before, figures(ours.runner))
            assert found == expected(steps[-1], read.config, tp, tokens_per_tile)
            kinds.update(found.keys())
    assert len(steps) > kinds["logits"] > 0 and len(steps) > kinds["features"] > 0
    assert kinds["batch"] == kinds["o_proj"] == len(steps)
    for runner in runners:  # the same on every rank: nobody takes part in anything else
        assert figures(runner) == figures(runners[0])


def test_a_picture_is_encoded_once_for_all_who_ask(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen2", **EIGHT)
    tokens_per_tile = read_checkpoint(folder).preprocessor.features_per_unit()
    assert tokens_per_tile is not None
    with tp_engine(folder, 4, prefix_caching=False) as (ours, _):
        before = figures(ours.runner)
        pictures = [[picture(3)] * 2, [picture(3), picture(0)], [picture(3)]]  # 5 tiles and 1
        for i, images in enumerate(pictures):
            add(ours, i, prompt(folder, "What?", images), SamplingParams(), 4)
        while ours.has_work:
            ours.step()
        found = since(before, figures(ours.runner))
        assert found["features"] == (1, 2 * tokens_per_tile * EIGHT["hidden_size"] * FLOAT), "6 tiles, 2 on the busiest rank"
        add(ours, 3, prompt(folder, "And now?", [picture(3)]), SamplingParams(), 4)
        while ours.has_work:
            ours.step()
        assert since(before, figures(ours.runner))["features"] == found["features"]


def test_one_machine_sends_no_pixels_and_nothing_for_text(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen2", **EIGHT)
    with tp_engine(folder, 4) as (ours, runners):
        add(ours, 0, prompt(folder, "What?", []), SamplingParams(), 4)
        while ours.has_work:
            ours.step()
        assert "features" not in figures(ours.runner)
        add(ours, 1, prompt(folder, "What?", [picture(3)]), SamplingParams(), 4)
        while ours.has_work:
            ours.step()
    assert all("pixels" not in figures(runner) and "features" in figures(runner) for runner in runners)


def test_another_machine_gets_each_of_its_tiles_once(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("qwen2", **EIGHT)
    with tp_engine(folder, 4, nnodes=2, rdzv_endpoint="127.0.0.1:1", prefix_caching=False) as (ours, runners):
        steps = watch(ours, monkeypatch)
        prompts = [*mixed(folder), prompt(folder, "again", [picture(1)])]
        for i, p in enumerate(prompts):
            add(ours, i, p, SamplingParams(), 4)
        while ours.has_work:
            ours.step()
    sent: Counter[int] = Counter()  # tiles by rank
    calls: Counter[int] = Counter()
    for step in steps:
        num_tiles = sum(len(task.units) for task in step.encode)
        for rank in (2, 3):
            number = len(range(rank, num_tiles, 4))
            sent[rank] += number
            calls[rank] += number > 0
    encoded = [task.digest for step in steps for task in step.encode]
    assert len(encoded) == len(set(encoded)) == len({s.pixels.digest for p in prompts for s in p.spans}) > 4
    tile = next(unit.num_bytes for p in prompts for s in p.spans for unit in s.pixels.units)
    assert figures(runners[0])["pixels"] == (sum(calls.values()), sum(sent.values()) * tile)
    assert "pixels" not in figures(runners[1])
    for rank in (2, 3):
        assert figures(runners[rank])["pixels"] == (calls[rank], sent[rank] * tile)
    assert sum(sent.values()) < sum(len(s.pixels.units) for p in prompts for s in p.spans), "only theirs"
