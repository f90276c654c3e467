"""A family that differs in everything gives the tokens of its plain definition, however its requests are computed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.engine.graphed import Again, launch_triton
from tests.engine.ranks import tp_engine
from tests.engine.reference import TIE, add, engine, prompt, run
from tests.models.toy_family import LEVELS, TOY, Reference, make_toy
from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.engine import Engine, Seat
from vlserve.engine.feature_encoder import deal
from vlserve.engine.messages import TokenEvent
from vlserve.errors import ConfigError
from vlserve.kernels.attention import plan as attention_plan
from vlserve.llm.kv_cache import block_bytes
from vlserve.models import registry
from vlserve.models.checkpoint import read_checkpoint
from vlserve.plan.tp_plan import make_plan
from vlserve.prompt.build import Prompt
from vlserve.quantize.source_checkpoint import Source

SIZES = ((9, 13), (16, 4), (4, 4), (30, 22), (4, 33), (9, 13))
GIB = 2**30
LENGTH = 10
ELSEWHERE = {"nnodes": 2, "rdzv_endpoint": "127.0.0.1:1"}  # rank 1 gets its pixels from rank 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILT_IN, "toy", TOY)
        yield make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


Asked = list[tuple[Prompt, list[tuple[int, float, float]]]]


@pytest.fixture(scope="module")
def asked(folder: Path, pictures: list[Image.Image]) -> Asked:
    """Prompts with none to three pictures, with what the definition answers: tokens, log-probabilities, gaps."""
    rng, reference, found = random.Random(1), Reference(folder), []
    for number in (0, 1, 1, 2, 3, 1, 2, 0):
        images = [pictures[i] for i in rng.sample(range(len(pictures)), number)]
        p = prompt(folder, rng.choice(("What shape is it?", "A red circle and two blue squares.", "?")), images)
        found.append((p, reference.generate(p.token_ids, images, LENGTH)))
    return found


def same(got: list[list[TokenEvent]], asked: Asked) -> None:
    """Tokens and log-probabilities are equal, but for what comes after a tie."""
    ties = 0
    for events, (_, want) in zip(got, asked, strict=True):
        assert len(events) == len(want)
        for event, (token, logprob, gap) in zip(events, want, strict=True):
            if event.token_id != token:
                assert gap < TIE, f"{event.token_id} for {token}, gap of the two best {gap:.2e}"
                ties += 1
                break
            assert event.logprob is not None and abs(event.logprob.logprob - logprob) < 1e-4
    assert ties <= 1


def answers(ours: Engine, asked: Asked) -> list[list[TokenEvent]]:
    for id, (p, _) in enumerate(asked):
        add(ours, id, p, SamplingParams(ignore_eos=True, logprobs=1), LENGTH)
    events = run(ours)
    return [events[id] for id in range(len(asked))]


def test_the_prompt_is_what_the_family_lays_out(asked: Asked, folder: Path) -> None:
    p = asked[4][0]
    assert [len(span.runs) for span in p.spans] == [span.pixels.units[0].shape[1] // 4 for span in p.spans], "a run a row"
    assert p.positions is not None and len({tuple(axis) for axis in p.positions.axes}) == 3
    assert max(map(max, p.positions.axes)) < p.positions.next < len(p.token_ids)
    features = {place for span in p.spans for first, number in span.runs for place in range(first, first + number)}
    picture_ids = read_checkpoint(folder).feature_token_ids
    assert {i for i, id in enumerate(p.token_ids) if id in picture_ids} == features


@pytest.mark.parametrize("block_size", (16, 4))
def test_alone_and_together(block_size: int, folder: Path, asked: Asked) -> None:
    ours = engine(folder, block_size=block_size, prefix_caching=False)
    same([answers(ours, [one])[0] for one in asked], asked)
    same(answers(ours, asked), asked)


@pytest.mark.parametrize("size", (1, 3, 7, 32))
def test_chunks_that_cut_pictures_and_rows(size: int, folder: Path, asked: Asked) -> None:
    same(answers(engine(folder, max_num_batched_tokens=size, block_size=4), asked), asked)


def test_from_the_prefix_cache(folder: Path, asked: Asked) -> None:
    ours = engine(folder, block_size=2)
    same(answers(ours, asked), asked)
    again = answers(ours, asked)
    same(again, asked)
    cached = [(events[0].cached_tokens, len(p.token_ids)) for events, (p, _) in zip(again, asked, strict=True)]
    assert all(number >= length - 2 for number, length in cached), "all but the last block"


def small(folder: Path, num_blocks: int, tp: int) -> dict[str, Any]:
    """Options for so many blocks of 4 tokens, too few for all requests at once, and for features of one picture."""
    checkpoint = read_checkpoint(folder)
    from vlserve.engine.loading import build_model
    from vlserve.llm.parallel import Split

    kinds = build_model(checkpoint, Split()).decoder.cache_kinds
    gib = (num_blocks + 0.5) * block_bytes(kinds, 4, torch.float32) / tp / GIB
    return {"kv_cache_gib": gib, "block_size": 4, "max_model_len": 160, "vision_cache_gib": 1e-6}


@pytest.mark.parametrize("tp", (1, 2))
def test_preempted(tp: int, folder: Path, asked: Asked) -> None:
    with tp_engine(folder, tp, max_num_batched_tokens=23, **small(folder, 52, tp)) as (ours, _):
        same(answers(ours, asked), asked)
        assert ours.scheduler.num_preemptions > 0, "the cache was meant to be too small for all"


@pytest.mark.parametrize("options", ({}, {"max_num_batched_tokens": 5, "block_size": 4}, ELSEWHERE))
def test_on_two_ranks(options: dict[str, Any], folder: Path, asked: Asked) -> None:
    with tp_engine(folder, 2, **options) as (ours, runners):
        same(answers(ours, asked), asked)
        encoded = [runner.features.num_bytes for runner in runners]
        assert encoded[0] == encoded[1] > 0


def test_as_on_a_gpu(folder: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels, interpreted, with windows; decode steps through fixed buffers with positions of three parts; overlap."""
    launch_triton(monkeypatch)
    monkeypatch.setattr(attention_plan, "INTERPRETERS", (2, 80))
    options = {"max_num_seqs": 3, "kv_cache_gib": 0.001, "max_model_len": 96, "dtype": "float32", "device": "cpu"}
    ours = Engine(EngineConfig(model=str(folder), **options), seat=Seat(recorder=Again()))  # type: ignore[arg-type]
    ours.overlaps = True
    some = [(p, want[:4]) for p, want in asked[:3]]
    for id, (p, want) in enumerate(some):
        add(ours, id, p, SamplingParams(ignore_eos=True, logprobs=1), len(want))
    events = run(ours)
    same([events[id] for id in range(len(some))], some)
    assert ours.runner.decodes is not None and ours.runner.decodes.graphs.recorded


def test_levels_are_kept_with_the_features(folder: Path, asked: Asked) -> None:
    ours = engine(folder)
    answers(ours, asked)
    features = sum({span.pixels.digest: span.layout.num_features for p, _ in asked for span in p.spans}.values())
    assert ours.runner.features.num_bytes == features * LEVELS * 48 * 4


def test_the_plan_counts_it(folder: Path) -> None:
    config = read_checkpoint(folder).config
    plan = make_plan(config, tp=2)
    assert plan.supported and plan.image_tokens == 64
    with torch.device("meta"):
        tower = TOY.build(config, TOY.preprocessor(config, {}), _alone()).tower
    assert tower is not None and plan.ranks[0].vision_bytes == sum(p.nbytes for p in tower.parameters())


def _alone() -> Any:
    from vlserve.llm.parallel import Split

    return Split()


def test_units_are_dealt_by_cost() -> None:
    assert deal([1] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]], "equal ones like cards"
    assert deal([1, 1, 9, 1, 1, 5], 2) == [[2], [0, 1, 3, 4, 5]], "a large one alone"
    assert deal([], 2) == [[], []] and deal([4.0], 3) == [[0], [], []]
    rng = random.Random(0)
    for _ in range(200):
        costs = [rng.choice((1.0, rng.random() * 20)) for _ in range(rng.randrange(1, 20))]
        number = rng.randrange(1, 9)
        shares = deal(costs, number)
        assert sorted(unit for share in shares for unit in share) == list(range(len(costs)))
        busiest = max(sum(costs[unit] for unit in share) for share in shares)
        least = max(sum(costs) / number, max(costs))
        assert busiest <= 2 * least


def test_it_is_refused_for_calibration_with_what_stands_in_the_way(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"pictures' features of 2 levels, positions of 3 parts, with which vlserve quantize"):
        Source(read_checkpoint(folder))
