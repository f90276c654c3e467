"""What only a GPU can show: whole engines on it, against the CPU and against one another. Skipped where there is none."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.ranks import tp_engine
from tests.engine.reference import Ties, add, engine, prompt, run
from vlserve.config import SamplingParams
from vlserve.engine import engine as engine_module
from vlserve.engine.engine import Engine
from vlserve.engine.messages import TokenEvent
from vlserve.models.checkpoint import DEMO
from vlserve.prompt.build import Prompt

sys.path.append(str(Path(__file__).parents[2] / "examples/demo_model"))
from held_out import make_items

DEVICE = "cuda"
NUM_ITEMS, MAX_TOKENS = 60, 24
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Answers = dict[int, list[TokenEvent]]


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    items = make_items(NUM_ITEMS, seed=7)
    pictures = [[Image.open(io.BytesIO(image)).convert("RGB") for image in item.images] for item in items]
    return [prompt(DEMO, item.turns[0], images) for item, images in zip(items, pictures, strict=True)]


@pytest.fixture(scope="module")
def on_the_cpu(prompts: list[Prompt]) -> Answers:
    return answers(engine(DEMO, device="cpu"), prompts)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Convolutions of float32 without the tensor cores' shorter type, which products do not have by default."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def answers(ours: Engine, prompts: list[Prompt]) -> Answers:
    for i, p in enumerate(prompts):
        add(ours, i, p, SamplingParams(logprobs=2), MAX_TOKENS)
    return run(ours)


def same(got: Answers, want: Answers) -> None:
    ties = Ties()
    for id in want:
        ties.same(got[id], want[id])
    print(ties)
    ties.check()
    assert ties.largest_logprob_difference < 1e-3


@pytest.mark.parametrize("overlap", (False, True))
@pytest.mark.parametrize("enforce_eager", (True, False))
def test_greedy_tokens_equal_the_cpus(prompts: list[Prompt], on_the_cpu: Answers, overlap: bool, enforce_eager: bool) -> None:
    ours = engine(DEMO, device=DEVICE, overlap=overlap, enforce_eager=enforce_eager, max_num_seqs=16)
    assert ours.overlaps == overlap and (ours.runner.decodes is None) == enforce_eager
    same(answers(ours, prompts), on_the_cpu)
    if ours.runner.decodes is not None:
        assert 16 in ours.runner.decodes.graphs.recorded


def test_two_ranks_on_one_device_equal_the_cpu(
    prompts: list[Prompt], on_the_cpu: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their collectives go through the host, over Gloo."""
    monkeypatch.setattr(engine_module, "resolve_device", lambda config, local_rank: torch.device(DEVICE, 0))
    with tp_engine(DEMO, 2, device=DEVICE, kv_cache_gib=0.05) as (ours, runners):
        assert all(runner.device.type == DEVICE for runner in runners)
        same(answers(ours, prompts), on_the_cpu)


@pytest.mark.parametrize("options", ({"kv_cache_dtype": "int8"}, {"dtype": "bfloat16"}, {"lm_head_bits": 8}), ids=str)
def test_other_types_give_nearly_the_cpus_first_tokens(
    prompts: list[Prompt], on_the_cpu: Answers, options: dict[str, Any]
) -> None:
    got = answers(engine(DEMO, device=DEVICE, **options), prompts)
    equal = sum(got[id][0].token_id == on_the_cpu[id][0].token_id for id in on_the_cpu)
    assert equal >= 0.9 * len(on_the_cpu)


def test_graphs_keep_to_the_memory_set_aside_for_them(prompts: list[Prompt]) -> None:
    """And what is held adds up to what torch has allocated."""
    ours = engine(DEMO, device=DEVICE, max_num_seqs=16)
    assert ours.runner.decodes is not None
    recorder: Any = ours.runner.decodes.graphs._recorder
    before = recorder.num_free_bytes
    answers(ours, prompts)
    print(f"graphs {ours.runner.decodes.graphs.recorded} left {recorder.num_free_bytes} of {before} bytes")
    assert 0 <= recorder.num_free_bytes < before
    assert sum(ours.runner.device_bytes().values()) == torch.cuda.memory_allocated()
