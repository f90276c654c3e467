"""The engine's own figures: what runs, what waits, what it holds, and what its caches gave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.reference import add, engine, prompt, run
from tests.engine.test_laws import picture
from vlserve.config import SamplingParams


def test_gauges_follow_the_requests(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen2")
    e = engine(folder, max_num_seqs=2, block_size=4)
    idle = e.stats()
    assert (idle.num_running, idle.num_waiting, idle.num_used_blocks) == (0, 0, 0) and idle.num_blocks == e.runner.num_blocks
    p = prompt(folder, "How many red circles?", [])
    for id in range(3):
        add(e, id, p, SamplingParams(ignore_eos=True), 5)
    assert e.stats().num_waiting == 3
    e.step()
    busy = e.stats()
    assert (busy.num_running, busy.num_waiting) == (2, 1)
    assert busy.num_used_blocks >= -(-len(p.token_ids) // 4)
    assert busy.prefix_queries == 2 * len(p.token_ids) and busy.prefix_hits == 0
    run(e)
    done = e.stats()
    assert (done.num_running, done.num_waiting, done.num_used_blocks) == (0, 0, 0)
    assert done.prefix_queries == 3 * len(p.token_ids) and done.prefix_hits == (len(p.token_ids) - 1) // 4 * 4


@pytest.mark.parametrize("prefix_caching", (False, True))
@pytest.mark.parametrize("size", (7, 1024))
def test_a_picture_is_one_query_however_it_is_cut(checkpoint: Callable[..., Path], size: int, prefix_caching: bool) -> None:
    folder = checkpoint("qwen2")
    e = engine(folder, max_num_batched_tokens=size, prefix_caching=prefix_caching)
    needed = 0
    for number, (text, images) in enumerate((("a", [1]), ("b", [1]), ("c", [2, 2]), ("d", []), ("e", [3, 1]))):
        p = prompt(folder, text, [picture(seed) for seed in images])
        add(e, number, p, SamplingParams(), 2)
        cached = run(e)[number][0].cached_tokens
        assert cached == 0 or prefix_caching
        needed += sum(sum(span.runs[-1]) > cached for span in p.spans)
    stats = e.stats()
    assert stats.image_queries == needed and stats.image_queries - stats.image_hits == 3 and stats.encode_s > 0
    assert prefix_caching or needed == 6
    assert stats.device_bytes[0]["vision_cache"] == e.runner.features.num_bytes > 0


def test_preemptions_are_counted(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen2")
    p = prompt(folder, "x", [])
    e = engine(folder, block_size=4, kv_cache_gib=520 * 384 / 2**30)  # 384 bytes a token: room for one of 512 tokens
    for id in range(8):
        add(e, id, p, SamplingParams(ignore_eos=True, seed=id, temperature=1.0), 100)
    run(e)
    assert e.stats().num_preemptions == e.scheduler.num_preemptions > 0


def test_device_bytes(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = engine(checkpoint("qwen2")).runner
    known = runner.device_bytes()
    assert known["vision"] + known["decoder"] + known["embedding"] == sum(p.nbytes for p in runner.model.parameters())
    assert known["kv_cache"] == sum(keys.nbytes + values.nbytes for keys, values in runner.cache.layers)
    assert set(known) == {"vision", "decoder", "embedding", "kv_cache", "vision_cache"}
    nested = {"allocated_bytes": {"all": {"current": 10**9}}}
    monkeypatch.setattr("torch.cuda.memory_stats_as_nested_dict", lambda device: nested)
    runner.device = torch.device("cuda")
    assert sum(runner.device_bytes().values()) == 10**9
