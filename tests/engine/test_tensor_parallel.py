"""Several ranks answer as one does: the language model is split, tiles are shared out, and nothing of it shows."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.ranks import tp_engine
from tests.engine.reference import Ties, add, ask, engine, prompt, run, tokens
from tests.vision.test_preprocess import noise
from vlserve.config import SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.memory import GIB
from vlserve.engine.messages import TokenEvent
from vlserve.errors import ConfigError
from vlserve.llm.config_readers import read_decoder_config
from vlserve.llm.kv_cache import KeysAndValues, block_bytes
from vlserve.models.checkpoint import DEMO, read_checkpoint
from vlserve.prompt.build import Prompt

sys.path.append(str(Path(__file__).parents[2] / "examples/demo_model"))
from held_out import make_items

Make = Callable[..., Path]
SAMPLING = SamplingParams(logprobs=2)
SHAPES = {0: (28, 28), 1: (60, 30), 2: (30, 90), 3: (120, 30), 4: (40, 37)}  # 1, 3, 4, 5 and 1 tiles
EIGHT = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
BIASES = {"attention_bias": True, "mlp_bias": True}
ODD = {"vocab_size": 341, "intermediate_size": 65}  # neither divides by two or more ranks
BY_EXPERT = {"expert_parallel": True}  # an option of the engine
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("qwen2", 2, ODD),
    ("qwen2", 4, EIGHT | ODD | {"tie_word_embeddings": True}),
    ("qwen2", 4, EIGHT | {"num_key_value_heads": 2}),  # each KV head on two ranks
    ("qwen3", 2, {"tie_word_embeddings": True}),
    ("qwen3", 4, EIGHT | {"intermediate_size": 5, "num_key_value_heads": 1}),  # of two places a rank, the last one has none
    ("llama", 2, BIASES | ODD),
    ("llama", 3, BIASES | {"num_key_value_heads": 3, "vocab_size": 343}),
    ("llama", 4, EIGHT | BIASES | {"num_key_value_heads": 2, "vocab_size": 342, "intermediate_size": 66}),
    ("mistral", 2, {}),
    ("qwen3_moe", 2, ODD | {"moe_intermediate_size": 41}),
    ("qwen3_moe", 4, EIGHT | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9} | BY_EXPERT),
]


def made(checkpoint: Make, decoder: str, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint, and what the engine is told beside it."""
    return checkpoint(decoder, **{key: settings[key] for key in settings.keys() - BY_EXPERT}), dict(
        BY_EXPERT.items() & settings.items()
    )


def picture(number: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(*SHAPES[number], seed=seed))


def mixed(folder: Path) -> list[Prompt]:
    """Without pictures, with one of each number of tiles, with several, with the same twice; some begin alike."""
    sets: list[list[Image.Image]] = [[], *([picture(n)] for n in SHAPES), [picture(0), picture(2)], [picture(1)] * 2]
    sets += [[picture(4, 1), picture(0, 1), picture(3, 1)], [], [picture(3)], [picture(0)]]
    return [prompt(folder, f"Question {'x' * (i * 5 % 11)} {i}", images) for i, images in enumerate(sets)]


def answers(ours: Engine, prompts: list[Prompt], max_tokens: int = 10) -> dict[int, list[TokenEvent]]:
    for i, p in enumerate(prompts):
        add(ours, i, p, SAMPLING, max_tokens)
    return run(ours)


def same(got: dict[int, list[TokenEvent]], want: dict[int, list[TokenEvent]]) -> Ties:
    ties = Ties()
    assert sorted(got) == sorted(want)
    for id in want:
        ties.same(got[id], want[id])
    ties.check()
    assert ties.largest_logprob_difference < 1e-3
    return ties


def small_cache(folder: Path, tp: int, num_blocks: int, block_size: int) -> float:
    """`kv_cache_gib` for so many blocks on each rank."""
    config = read_decoder_config(read_checkpoint(folder).config["text_config"])
    kind = KeysAndValues(num_kv_heads=max(1, config.num_key_value_heads // tp), head_dim=config.head_dim)
    per_block = block_bytes([kind] * config.num_hidden_layers, block_size, torch.float32)
    return (num_blocks + 0.5) * per_block / GIB


@pytest.fixture(scope="module")
def one_rank() -> tuple[list[Prompt], dict[int, list[TokenEvent]]]:
    items = make_items(30, seed=7)
    pictures = [[Image.open(io.BytesIO(image)).convert("RGB") for image in item.images] for item in items]
    prompts = [prompt(DEMO, item.turns[0], images) for item, images in zip(items, pictures, strict=True)]
    return prompts, answers(engine(DEMO), prompts, 24)


@pytest.mark.parametrize("tp", (2, 4))
def test_questions_to_the_demo_equal_one_rank(tp: int, one_rank: tuple[list[Prompt], dict[int, list[TokenEvent]]]) -> None:
    prompts, want = one_rank
    with tp_engine(DEMO, tp, kv_cache_gib=0.05) as (ours, _):
        ties = same(answers(ours, prompts, 24), want)
    print(f"demo, tp={tp}: {ties}")
    assert ties.compared == 30


@pytest.mark.parametrize("decoder,tp,settings", CASES, ids=str)
def test_every_decoder_equals_one_rank(decoder: str, tp: int, settings: dict[str, Any], checkpoint: Make) -> None:
    """In the worst company: chunks that cut pictures, a KV cache too small for all, features that are dropped and made again."""
    folder, by_expert = made(checkpoint, decoder, settings)
    prompts = mixed(folder)
    want = answers(engine(folder), prompts)
    rough: dict[str, Any] = {"max_num_batched_tokens": 29, "block_size": 4, "max_model_len": 200, "vision_cache_gib": 5e-6}
    rough |= {"kv_cache_gib": small_cache(folder, tp, 55, 4), "replicate_kv_heads": True} | by_expert
    with tp_engine(folder, tp, **rough) as (ours, runners):
        assert ours.runner.num_blocks == 55
        ties = same(answers(ours, prompts), want)
        assert ours.scheduler.num_preemptions > 0, "the cache was meant to be too small for all"
        encoded = ours.runner.image_queries - ours.runner.image_hits
        assert encoded > len({s.pixels.digest for p in prompts for s in p.spans}), "some features were meant to be made again"
    print(f"{decoder}, tp={tp}: {ties}")
    kept = [runner.features.num_bytes for runner in runners]
    assert kept == [kept[0]] * tp and kept[0] <= 5e-6 * GIB
    assert not ours.runner._announcer._tables and not any(runner._listener._tables for runner in runners)


@pytest.fixture
def folder(checkpoint: Make) -> Path:
    return checkpoint("qwen3", **EIGHT, **ODD)


def test_a_cached_prefix_equals_one_rank(folder: Path) -> None:
    prompts = mixed(folder)
    want = answers(engine(folder, block_size=4), prompts)
    with tp_engine(folder, 2, block_size=4) as (ours, _):
        same(answers(ours, prompts), want)
        warm = answers(ours, prompts)  # under the ids of requests that ended
    same(warm, want)
    assert all(warm[i][-1].cached_tokens >= len(p.token_ids) - 4 > 0 for i, p in enumerate(prompts))


def test_draws_equal_one_rank(folder: Path) -> None:
    prompts = mixed(folder)
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 11, "ignore_eos": True}
    want = ask(engine(folder), prompts, 20, **options)
    with tp_engine(folder, 4) as (ours, _):
        assert ask(ours, prompts, 20, **options) == want
    assert len(set(map(tuple, want))) > len(want) // 2, "draws were meant to vary"


def test_a_new_request_under_an_old_id_equals_one_rank(folder: Path) -> None:
    """What ranks remember of a sequence ends with it."""
    first, second = (prompt(folder, text, []) for text in ("First?", "And then?"))
    want = [answers(engine(folder), [p], 5) for p in (first, second)]
    with tp_engine(folder, 2) as (ours, _):
        for p, events in zip((first, second), want, strict=True):
            same(answers(ours, [p], 5), events)


def test_aborts_leave_the_others_as_they_are(folder: Path) -> None:
    prompts = mixed(folder)
    want = answers(engine(folder), prompts, 12)
    got: dict[int, list[TokenEvent]] = {}
    with tp_engine(folder, 2, max_num_seqs=4, max_num_batched_tokens=31, block_size=4) as (ours, _):
        for i, p in enumerate(prompts):
            add(ours, i, p, SAMPLING, 12)
        aborted = {0: [1], 2: [2, 11], 5: [4], 9: [7]}  # by step: waiting, in the middle of the prompt, decoding
        step = 0
        while ours.has_work:
            for event in ours.abort(aborted.get(step, [])) + ours.step():
                got.setdefault(event.id, []).append(event)
            step += 1
        ours.scheduler.pool.check()
    ended = {id for id, events in got.items() if events[-1].finish_reason == "abort"}
    assert ended == {1, 2, 4, 7, 11} and any(tokens(got[id]) for id in ended) and not all(tokens(got[id]) for id in ended)
    same({id: events for id, events in got.items() if id not in ended}, {id: want[id] for id in want if id not in ended})
    for id in ended:
        assert tokens(got[id]) == tokens(want[id])[: len(tokens(got[id]))]


@pytest.mark.parametrize("number,tiles", ((0, 1), (1, 3), (3, 5)))
def test_tiles_that_do_not_divide_equal_one_rank(number: int, tiles: int, folder: Path) -> None:
    p = prompt(folder, "What?", [picture(number)])
    assert sum(len(span.pixels.units) for span in p.spans) == tiles
    want = answers(engine(folder), [p])
    with tp_engine(folder, 4) as (ours, _):
        same(answers(ours, [p]), want)


def test_ranks_on_two_machines_equal_one_rank(folder: Path) -> None:
    prompts = mixed(folder)
    want = answers(engine(folder), prompts)
    machines: dict[str, Any] = {"nnodes": 2, "rdzv_endpoint": "127.0.0.1:1", "vision_cache_gib": 5e-6}
    with tp_engine(folder, 4, max_num_batched_tokens=29, **machines) as (ours, _):
        same(answers(ours, prompts), want)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision_is_near_one_rank(dtype: str, folder: Path) -> None:
    """Sums of rounded parts are not the rounded sum, so tokens may part; the first one's logprobs are near."""
    prompts = mixed(folder)
    want = answers(engine(folder, dtype=dtype), prompts, 6)
    with tp_engine(folder, 4, dtype=dtype) as (ours, runners):
        got = answers(ours, prompts, 6)
        assert {runner.dtype for runner in runners} == {getattr(torch, dtype)}
    bound = {"bfloat16": 0.15, "float16": 0.02}[dtype]
    for id in want:
        one, other = want[id][0].logprob, got[id][0].logprob
        assert one is not None and other is not None
        assert abs(one.top[0][1] - other.top[0][1]) < bound, id


def test_experts_are_not_shared_out_where_there_are_none(checkpoint: Make) -> None:
    with pytest.raises(ConfigError, match="expert_parallel is on, but the model has no experts"):
        engine(checkpoint("qwen2"), expert_parallel=True)
    with pytest.raises(ConfigError, match="tp=16 does not work with expert_parallel: the model has 8 experts"):
        engine(checkpoint("qwen3_moe"), expert_parallel=True, tp=16)


def test_every_rank_holds_the_same_bytes(checkpoint: Make) -> None:
    for decoder, tp, settings in CASES:
        folder, by_expert = made(checkpoint, decoder, settings)
        with tp_engine(folder, tp, replicate_kv_heads=True, kv_cache_gib=None, **by_expert) as (ours, runners):
            answers(ours, mixed(folder)[:4], 2)
        held = [sum(runner.device_bytes().values()) for runner in runners]
        assert max(held) <= 1.01 * min(held), f"{decoder} {tp}: {held}"
        assert len(held) == tp and all(runner.device_bytes()["vision_cache"] > 0 for runner in runners)


def test_nothing_is_kept_for_ranks_that_are_not_there(folder: Path) -> None:
    ours = engine(folder, vision_cache_gib=0)
    answers(ours, mixed(folder), 3)
    announcer = ours.runner._announcer
    assert not announcer._dropped and not announcer._ended and not announcer._tables
