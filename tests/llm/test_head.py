"""The head in 8 bits: whose rows are whose, what stays of a tied embedding, and answers equal to those of its own numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.engine.ranks import tp_engine
from tests.engine.reference import ask, engine, prompt
from tests.llm.parts import splits
from tests.plan.test_footprint import build, config
from vlserve.config import EngineConfig
from vlserve.engine.memory import weight_bytes
from vlserve.errors import ConfigError
from vlserve.kernels.head.reference import quantise_rows
from vlserve.llm.embedding import VocabParallel
from vlserve.llm.shard_writer import OfflineGroup
from vlserve.llm.tensor_parallel import Split
from vlserve.plan.tp_plan import make_plan

Make = Callable[..., Path]
TEXTS = ("what is this", "count to ten", "a")


@pytest.mark.parametrize("embeds", (True, False))
@pytest.mark.parametrize("vocab_size,tp", [(7, 1), (7, 2), (5, 4)])
def test_the_ranks_rows_add_up(vocab_size: int, tp: int, embeds: bool) -> None:
    table, hidden, ids = torch.randn(vocab_size, 6), torch.randn(3, 6), torch.arange(vocab_size)
    logits, rows = [], []
    for split in splits(tp):
        part = VocabParallel(vocab_size, 6, split)
        part.weight.data.zero_()
        part.weight.data[: part.span.stop - part.span.start] = table[part.span.start : part.span.stop]
        part.quantise_head(embeds=embeds)
        found = part.logits(hidden)
        assert found is not None
        logits.append(F.pad(found, (0, part.span.size - found.shape[1])))
        if embeds:
            rows.append(part.embed(ids))
        else:
            assert part.weight.numel() == 0
    codes, scales = quantise_rows(table)
    assert torch.allclose(torch.cat(logits, -1)[:, :vocab_size], hidden @ (codes * scales[:, None]).T, atol=1e-5)
    assert not embeds or torch.equal(torch.stack(rows).sum(0), table)


def test_answers_are_those_of_the_rounded_head(checkpoint: Make) -> None:
    folder = checkpoint("qwen2")
    prompts = [prompt(folder, text) for text in TEXTS]
    dense = engine(folder)
    head = dense.runner.model.decoder.lm_head
    assert head is not None
    codes, scales = quantise_rows(head.weight)
    head.weight.data.copy_(codes * scales[:, None])
    want = ask(dense, prompts)
    assert ask(engine(folder, lm_head_bits=8), prompts) == want
    with tp_engine(folder, 2, lm_head_bits=8) as (ours, _):
        assert ask(ours, prompts) == want


def test_a_tied_embedding_stays(checkpoint: Make) -> None:
    folder = checkpoint("qwen2", tie_word_embeddings=True)
    ours, dense = engine(folder, lm_head_bits=8), engine(folder)
    table = ours.runner.model.decoder.embed_tokens
    assert torch.equal(table.weight, dense.runner.model.decoder.embed_tokens.weight) and table.int8_rows is not None
    assert all(ask(ours, [prompt(folder, text) for text in TEXTS]))


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("tp", (1, 2))
def test_the_plan_counts_it(tied: bool, tp: int) -> None:
    settings: dict[str, Any] = config(tie_word_embeddings=tied)
    for rank in make_plan(settings, tp=tp, lm_head_bits=8).ranks:
        with torch.device("meta"):
            model = build(settings, Split(group=OfflineGroup(rank.rank, tp)))
            model.decoder.quantise_head()
        held = weight_bytes(model)
        assert (rank.vision_bytes, rank.decoder_bytes, rank.embedding_bytes) == tuple(held.values())


@pytest.mark.parametrize("bits", (4, 0, "8", None))
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ConfigError, match=f"lm_head_bits is {bits!r}; expected 16 or 8"):
        EngineConfig(lm_head_bits=bits)
