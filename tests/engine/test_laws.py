"""Greedy answers do not depend on company, chunks, caches or preemption; pictures keep the prefix cache honest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.reference import Ties, add, engine, prompt, run
from tests.vision.test_preprocess import noise
from vlserve.config import SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.messages import TokenEvent
from vlserve.llm.kv_cache import block_bytes
from vlserve.prompt.build import Prompt

SAMPLING = SamplingParams(logprobs=2)
EXPERTS = {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 9}


def picture(seed: int, size: tuple[int, int] = (60, 30)) -> Image.Image:
    return Image.fromarray(noise(*size, seed=seed))


def answer(engine: Engine, prompt: Prompt, max_tokens: int = 10) -> list[TokenEvent]:
    add(engine, 0, prompt, SAMPLING, max_tokens)
    return run(engine)[0]


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen2")


@pytest.fixture(params=("an MLP", "experts"))
def any_folder(request: pytest.FixtureRequest, folder: Path, checkpoint: Callable[..., Path]) -> Path:
    """Also a mixture of experts with a window."""
    return folder if request.param == "an MLP" else checkpoint("qwen3_moe", **EXPERTS)


def test_chunked_equals_whole_whatever_the_chunk_size(any_folder: Path, folder: Path) -> None:
    p = prompt(any_folder, "How many red circles?", [picture(1), picture(2, (20, 90))])
    want = answer(engine(any_folder), p)
    ties = Ties()
    number = len(p.token_ids)
    sizes = [*range(1, 9), *range(9, number, 4), number - 1, number]
    for size in sizes if any_folder == folder else sizes[1::6]:
        ties.same(answer(engine(any_folder, max_num_batched_tokens=size, block_size=4), p), want)
    ties.check()


@pytest.mark.parametrize("block_size", (1, 5, 16, 64))
def test_the_block_size_changes_nothing(folder: Path, block_size: int) -> None:
    p = prompt(folder, "What shape is it?", [picture(1)])
    ties = Ties()
    ties.same(answer(engine(folder, block_size=block_size), p), answer(engine(folder), p))
    ties.check()


def mixed_prompts(folder: Path) -> list[Prompt]:
    return [
        prompt(folder, f"Question {i} " + "word " * (i * 5 % 23), [picture(i, (20 + 9 * i, 40))] * (i % 3)) for i in range(16)
    ]


def test_a_batch_of_16_equals_16_singles(any_folder: Path) -> None:
    prompts = mixed_prompts(any_folder)
    together, alone = engine(any_folder, max_num_batched_tokens=97), engine(any_folder, prefix_caching=False)
    for i, p in enumerate(prompts):
        add(together, i, p, SAMPLING, 12)
    events = run(together)
    ties = Ties()
    for i, p in enumerate(prompts):
        ties.same(events[i], answer(alone, p, 12))
    ties.check()


def test_a_cached_prefix_equals_cold(any_folder: Path) -> None:
    ours, ties = engine(any_folder, block_size=4), Ties()
    for p in mixed_prompts(any_folder):
        cold = answer(ours, p)
        warm = answer(ours, p)
        ties.same(warm, cold)
        assert warm[-1].cached_tokens >= len(p.token_ids) - 4 > 0
        assert warm[-1].cached_tokens < len(p.token_ids)
    ties.check()


def test_preempted_equals_undisturbed(any_folder: Path) -> None:
    prompts = mixed_prompts(any_folder)
    alone = engine(any_folder, prefix_caching=False)
    num_bytes = 50 * block_bytes(alone.runner.model.decoder.cache_kinds, 4, torch.float32)
    small = engine(any_folder, block_size=4, max_model_len=200, kv_cache_gib=num_bytes / 2**30, prefix_caching=False)
    for i, p in enumerate(prompts):
        add(small, i, p, SAMPLING, 24)
    events = run(small)
    assert small.scheduler.num_preemptions > 0, "the cache was meant to be too small for all"
    ties = Ties()
    for i, p in enumerate(prompts):
        ties.same(events[i], answer(alone, p, 24))
    ties.check()


def test_different_pictures_behind_the_same_text_never_share_blocks(folder: Path) -> None:
    ours = engine(folder, block_size=1)
    first, second = (prompt(folder, "What shape is it?", [picture(seed)]) for seed in (1, 2))
    assert first.token_ids == second.token_ids
    start = first.spans[0].runs[0][0]
    answer(ours, first)
    other = answer(ours, second)
    assert other[-1].cached_tokens == start, "only what stands before the picture is shared"
    again = answer(ours, first)
    assert again[-1].cached_tokens == len(first.token_ids) - 1
    ties = Ties()
    ties.same(other, answer(engine(folder), second))
    ties.check()


def test_features_stay_within_their_bytes_and_are_computed_once(folder: Path) -> None:
    encoded: list[int] = []

    def count(ours: Engine) -> Engine:
        tower = ours.runner.model.tower
        assert tower is not None
        encode = tower.encode

        def counting(pixels: Any, units: Any) -> Any:
            encoded.append(len(units))
            return encode(pixels, units)

        tower.encode = counting  # type: ignore[method-assign]
        return ours

    p = prompt(folder, "What?", [picture(1)])
    keeping = count(engine(folder, prefix_caching=False))
    answer(keeping, p)
    answer(keeping, p)
    assert len(encoded) == 1 and keeping.runner.features.num_bytes > 0
    encoded.clear()
    # one token at a time: the picture is cut by chunks and still encoded once, though nothing may be kept
    dropping = count(engine(folder, vision_cache_gib=0, max_num_batched_tokens=1))
    answer(dropping, p)
    assert len(encoded) == 1 and dropping.runner.features.num_bytes == 0


def test_aborting_in_any_state_frees_everything(folder: Path) -> None:
    ours = engine(folder, max_num_seqs=2, max_num_batched_tokens=8)
    for i, p in enumerate(mixed_prompts(folder)[:4]):
        add(ours, i, p, SAMPLING, 20)
    ours.step()
    events = ours.abort([0, 3, 99])
    assert [(e.id, e.finish_reason) for e in events] == [(0, "abort"), (3, "abort")]
    rest = run(ours)
    assert sorted(rest) == [1, 2] and rest[1][-1].finish_reason in ("length", "stop")


def test_a_step_that_breaks_ends_its_requests_and_not_the_engine(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = engine(folder)
    p = prompt(folder, "What?", [picture(1)])
    tower = ours.runner.model.tower
    assert tower is not None
    whole = tower.encode

    def broken(pixels: Any, units: Any) -> Any:
        raise RuntimeError("no memory at /secret/path")

    tower.encode = broken  # type: ignore[method-assign]
    (event,) = answer(ours, p)
    assert event.finish_reason == "error" and event.error and "secret" not in event.error
    tower.encode = whole  # type: ignore[method-assign]
    assert answer(ours, p)[-1].finish_reason in ("length", "stop")
