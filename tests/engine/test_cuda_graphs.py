"""Steps through padded buffers that stay where they are give what plain steps give, and recording them keeps to its bounds.

Triton's kernels are interpreted; a recorder that calls the work again stands for CUDA's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.graphed import Again, launch_triton
from tests.engine.reference import add, engine, prompt, run, tokens
from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.batch import Rows
from vlserve.engine.cuda_graphs import DecodeGraphs, Graphs, Work
from vlserve.engine.engine import Engine, Seat
from vlserve.engine.loading import load_model
from vlserve.engine.process_group import DistributedGroup
from vlserve.kernels.attention import plan as attention_plan
from vlserve.kernels.attention import plan_attention
from vlserve.kernels.attention.plan import FixedDecodes, Shape
from vlserve.llm.kv_cache import KVCache
from vlserve.llm.parallel import Split
from vlserve.models.checkpoint import read_checkpoint
from vlserve.plan.cuda_graph_sizes import MOST_ROWS, decode_sizes, next_size

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_triton(monkeypatch)


def test_sizes_grow_by_eight_up_to_the_largest_step() -> None:
    assert decode_sizes(1) == (1,) and decode_sizes(3) == (1, 2, 3) and decode_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert decode_sizes(64)[-3:] == (48, 56, 64) and decode_sizes(1000)[-1] == MOST_ROWS
    for most in (1, 7, 64, 500):
        sizes = decode_sizes(most)
        assert all(next_size(sizes, number) is not None for number in range(1, min(most, MOST_ROWS) + 1))
        assert next_size(sizes, sizes[-1] + 1) is None


def test_the_schedule_of_a_size_is_always_as_long_and_covers_every_context() -> None:
    shape = Shape(heads=8, kv_heads=2, dim=64, itemsize=2, stored_itemsize=2, num_sms=132, arch=90, key=(0,))
    for size, contexts in ((1, [100_000]), (4, [1, 5000, 17, 1]), (8, [131_072] * 8), (128, [90_000] + [3] * 127)):
        fixed = FixedDecodes(size, shape)
        numbers = fixed.numbers(contexts)
        assert len(numbers) == fixed.num_numbers
        items, chunk = numbers[5 * size : -1 - size], numbers[-1] * shape.tiling(1).positions
        assert [items.count(i) for i in range(size)] == [-(-context // chunk) for context in contexts]
        merged = [item for item in numbers[-1 - size : -1] if item >= 0]
        assert merged == [numbers[5 * i] for i, context in enumerate(contexts) if context > chunk]


def make(folder: Path, num_blocks: int, block_size: int = 4) -> tuple[Any, KVCache]:
    config = EngineConfig(model=str(folder), dtype="float32", device="cpu")
    model = load_model(read_checkpoint(folder), config, Split(), CPU, lambda name, done, total: None)
    model.decoder.prepare(64, CPU)
    decoder = model.decoder
    cache = KVCache(decoder.cache_kinds, num_blocks=num_blocks, block_size=block_size, dtype=torch.float32, device=CPU)
    for keys, values in cache.layers:
        for blocks in (keys, values):
            assert isinstance(blocks, torch.Tensor)
            blocks.normal_()
    return model, cache


def decodes(contexts: list[int], first: int = 0, block_size: int = 4) -> Rows:
    """Each sequence has blocks of its own, and its last token is computed."""
    tables, block = [], first
    for context in contexts:
        tables.append(list(range(block, block + -(-context // block_size))))
        block += len(tables[-1])
    slots = [table[-1] * block_size + (context - 1) % block_size for table, context in zip(tables, contexts, strict=True)]
    return Rows(
        ids=[7 + 3 * i for i in range(len(contexts))],
        positions=[context - 1 for context in contexts],
        slots=slots,
        sample_rows=list(range(len(contexts))),
        feature_rows=[],
        partial_blocks=[],
        tables=tables,
        query_lens=(1,) * len(contexts),
        context_lens=tuple(contexts),
    )


def test_a_padded_step_equals_the_plain_one_and_touches_no_other_block(
    checkpoint: Callable[..., Path], triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_plan, "INTERPRETERS", (4, 80))  # few programs: the interpreter runs idle ones too
    model, cache = make(checkpoint("qwen2", num_hidden_layers=2), num_blocks=33)
    recorder = Again()
    graphs = DecodeGraphs(model, cache, recorder, max_num_seqs=4, max_model_len=64, spare_block=32)
    for contexts in ([9, 30, 5], [64, 1, 2], [12], [1, 2, 50]):  # the second and the last of size 4 are replayed
        rows = decodes(contexts, first=len(contexts))
        kept = [[blocks.clone() for blocks in layer] for layer in cache.layers]
        size = graphs.size_for(rows)
        assert size is not None
        got = graphs.run(size, rows, torch.zeros(1, dtype=torch.int64)).clone()
        written = {slot // 4 for slot in rows.slots}
        for layer, old in zip(cache.layers, kept, strict=True):
            for now, before in zip(layer, old, strict=True):
                assert isinstance(now, torch.Tensor)
                changed = (now != before).flatten(1).any(1).nonzero().flatten().tolist()
                assert set(changed) - {32} == written
        width = max(map(len, rows.tables))
        metadata = plan_attention(
            query_lens=rows.query_lens,
            context_lens=rows.context_lens,
            block_tables=torch.tensor([table + table[-1:] * (width - len(table)) for table in rows.tables]),
            slots=torch.tensor(rows.slots),
            block_size=4,
        )
        want = model.decoder(model.decoder.embed(torch.tensor(rows.ids)), torch.tensor(rows.positions), cache, metadata)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert graphs.graphs.recorded == (4, 1) and recorder.num_recorded == 2


def test_answers_are_those_of_plain_steps(checkpoint: Callable[..., Path], triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole engine as on CUDA: sequences that come and go, a picture, sampling. The plain one has torch's operators."""
    from PIL import Image

    from tests.vision.test_preprocess import noise

    monkeypatch.setattr(attention_plan, "INTERPRETERS", (2, 80))
    folder = checkpoint("qwen2", num_hidden_layers=2)
    asked = [prompt(folder, "a"), prompt(folder, "b c", [Image.fromarray(noise(20, 20, seed=1))]), prompt(folder, "d")]
    sampling = [SamplingParams(), SamplingParams(temperature=1.0, seed=3, top_k=5), SamplingParams(logprobs=2)]
    answers = []
    for is_replayed in (True, False):
        if is_replayed:
            options = {"max_num_seqs": 3, "kv_cache_gib": 0.001, "max_model_len": 96}
            config = EngineConfig(model=str(folder), dtype="float32", device="cpu", **options)  # type: ignore[arg-type]
            ours = Engine(config, seat=Seat(recorder=Again()))
            ours.overlaps = True
        else:
            monkeypatch.undo()
            ours = engine(folder)
        for i, (p, s) in enumerate(zip(asked, sampling, strict=True)):
            add(ours, i, p, s, 3 + i)
        events = run(ours)
        answers.append([tokens(events[i]) for i in range(3)])
        if is_replayed:
            assert ours.runner.decodes is not None and ours.runner.encoder is not None and ours.runner.encoder.graphs is not None
            assert ours.runner.decodes.graphs.recorded == (3, 2, 1) and ours.runner.encoder.graphs.graphs.recorded == (1,)
    assert answers[0] == answers[1]


def test_what_cannot_be_recorded_is_done_as_it_is_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Again):
        def record(self, work: Work) -> Work:
            raise RuntimeError("operation not permitted when stream is capturing")

    done: list[int] = []
    graphs = Graphs("decode steps", (1, 2), Broken())
    with caplog.at_level(logging.WARNING):
        for number in (1, 2, 2):
            size = graphs.size_for(number)
            graphs.run(size, lambda: done.append(1)) if size is not None else done.append(2)
    assert done == [1, 2, 2] and len(caplog.records) == 1
    assert "not permitted when stream is capturing" in caplog.text and "decode steps" in caplog.text


def test_no_more_are_made_than_there_is_memory_for(caplog: pytest.LogCaptureFixture) -> None:
    class Small(Again):
        def record(self, work: Work) -> Work:
            self.num_free_bytes = 0
            return super().record(work)

    recorder = Small()
    graphs = Graphs("decode steps", (1, 2, 4), recorder)
    with caplog.at_level(logging.WARNING):
        for size in (2, 1):
            graphs.run(size, lambda: None)
    assert recorder.num_recorded == 1 and "used up" in caplog.text
    assert [graphs.size_for(number) for number in (1, 2, 3)] == [2, 2, None]


def test_ranks_record_together_or_not_at_all() -> None:
    class Pair(DistributedGroup):
        """The other rank fails at size 2."""

        def __init__(self) -> None:
            self.answers, self.traffic, self._is_recording = iter((1, 1, 1, 0)), {}, False

        def minimum(self, value: int, kind: str) -> int:
            return min(value, next(self.answers))

    graphs = Graphs("decode steps", (1, 2), Again(), Pair())
    graphs.run(1, lambda: None)
    assert graphs.recorded == (1,)
    graphs.run(2, lambda: None)
    assert graphs.recorded == () and graphs.size_for(1) is None
