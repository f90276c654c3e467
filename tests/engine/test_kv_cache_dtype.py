"""With keys and values in eight bits the laws hold as ever: whatever the chunks, the company, the caches and the ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.test_main import vlserve
from tests.engine.ranks import tp_engine
from tests.engine.reference import Ties, add, engine, prompt, run
from tests.engine.test_laws import SAMPLING, answer, mixed_prompts, picture
from vlserve.config import EngineConfig
from vlserve.engine.engine import Engine
from vlserve.errors import ConfigError
from vlserve.kernels.kv_cache.types import QuantizedBlocks
from vlserve.llm.kv_cache import block_bytes
from vlserve.plan.tp_plan import make_plan

KINDS = ("int8", "fp8")
BYTES = {"auto": 8 * 4, "int8": 8 + 2, "fp8": 8 + 2}  # a head of a token, of the test's checkpoint in float32


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Callable[..., Engine]:
    def build(**options: Any) -> Engine:
        return engine(checkpoint("qwen2"), kv_cache_dtype=request.param, **options)

    build.folder, build.kind = checkpoint("qwen2"), request.param  # type: ignore[attr-defined]
    return build


def test_chunked_equals_whole(make: Any) -> None:
    p = prompt(make.folder, "How many red circles?", [picture(1)])
    want, ties = answer(make(), p), Ties()
    for size in (1, 5, 33, len(p.token_ids) - 1):
        ties.same(answer(make(max_num_batched_tokens=size, block_size=4), p), want)
    for block_size in (1, 5, 64):
        ties.same(answer(make(block_size=block_size), p), want)
    ties.check()


def test_a_batch_equals_singles_and_a_cached_prefix_equals_cold(make: Any) -> None:
    prompts, ties = mixed_prompts(make.folder)[:6], Ties()
    together, alone = make(max_num_batched_tokens=97), make(block_size=4)
    for i, p in enumerate(prompts):
        add(together, i, p, SAMPLING, 12)
    events = run(together)
    for i, p in enumerate(prompts):
        cold, warm = answer(alone, p, 12), answer(alone, p, 12)
        assert warm[-1].cached_tokens >= len(p.token_ids) - 4 > 0
        ties.same(events[i], cold)
        ties.same(warm, cold)
    ties.check()


def test_preempted_equals_undisturbed_and_what_was_left_in_blocks_reaches_nobody(make: Any) -> None:
    prompts, ties = mixed_prompts(make.folder)[:8], Ties()
    sizes = {"block_size": 4, "max_model_len": 200, "kv_cache_gib": 50 * 4 * 2 * 3 * 2 * BYTES[make.kind] / 2**30}
    small = make(**sizes, prefix_caching=False)
    assert small.runner.num_blocks == 50
    for blocks in (blocks for layer in small.runner.cache.layers for blocks in layer):
        assert isinstance(blocks, QuantizedBlocks)
        blocks.codes.fill_(0x7F)
        blocks.scales.fill_(float("nan"))
    for i, p in enumerate(prompts):
        add(small, i, p, SAMPLING, 20)
    events = run(small)
    assert small.scheduler.num_preemptions > 0, "the cache was meant to be too small for all"
    for i, p in enumerate(prompts):
        ties.same(events[i], answer(make(), p, 20))
    ties.check()


def test_two_ranks_equal_one(make: Any) -> None:
    prompts, ties = mixed_prompts(make.folder)[:3], Ties()
    with tp_engine(make.folder, 2, kv_cache_dtype=make.kind) as (ours, runners):
        for runner in runners:
            keys = runner.cache.layers[0][0]
            assert isinstance(keys, QuantizedBlocks) and keys.shape[2] == 1
        for i, p in enumerate(prompts):
            add(ours, i, p, SAMPLING, 12)
        events = run(ours)
    for i, p in enumerate(prompts):
        ties.same(events[i], answer(make(), p, 12))
    ties.check()


def test_its_bytes_are_true_everywhere(make: Any) -> None:
    ours, plain = make(kv_cache_gib=0.01), engine(make.folder, kv_cache_gib=0.01)
    assert ours.runner.num_blocks == pytest.approx(plain.runner.num_blocks * BYTES["auto"] / BYTES[make.kind], abs=4)
    held = sum(keys.nbytes + values.nbytes for keys, values in ours.runner.cache.layers)
    assert ours.stats().device_bytes[0]["kv_cache"] == ours.runner.device_bytes()["kv_cache"] == held <= 0.01 * 2**30


def test_a_16_bit_type_has_about_half_the_tokens() -> None:
    big = {"vocab_size": 1000, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    big |= {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 4096, "model_type": "qwen2"}
    plans = {
        kind: make_plan({**big, "dtype": "bfloat16"}, tp=1, device_memory=24.0, max_num_seqs=4096, kv_cache_dtype=kind).kv_tokens
        for kind in ("auto", *KINDS)
    }
    assert plans["auto"] and plans["int8"] == plans["fp8"] and 1.93 < (plans["int8"] or 0) / plans["auto"] < 1.95


@pytest.mark.parametrize("value", ["fp8_e5m2", "int4", "", None, 8])
def test_other_types_are_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is .*; expected one of auto, int8, fp8") as caught:
        EngineConfig(kv_cache_dtype=value)
    assert repr(value) in str(caught.value)


def test_the_commands_refuse_them_too_and_the_plan_names_the_type() -> None:
    for command in ("serve", "plan"):
        done = vlserve(command, "demo", "--kv-cache-dtype", "fp8_e5m2")
        assert done.returncode == 2 and "--kv-cache-dtype" in done.stderr and "fp8_e5m2" in done.stderr
    done = vlserve("plan", "demo", "--tp", "1", "--kv-cache-dtype", "int8")
    assert done.returncode == 0 and "KV cache in int8" in done.stdout


def test_a_block_of_a_rank(make: Any) -> None:
    decoder = make().runner.model.decoder
    for dtype in (torch.float32, torch.bfloat16):
        assert block_bytes(decoder.cache_kinds, 16, dtype, make.kind) == 2 * 3 * 2 * 16 * BYTES[make.kind]
