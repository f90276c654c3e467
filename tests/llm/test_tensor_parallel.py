"""Which part of a weight is whose: the parts make up the whole, and what the ranks compute adds up to it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.llm.parts import Part, build, full_shapes, random_text_config, save_checkpoint, splits
from vlserve.llm.embedding import VocabParallel
from vlserve.llm.linear import ColumnParallelLinear, RowParallelLinear
from vlserve.llm.tensor_parallel import Span, Split
from vlserve.llm.weights import load_weights

SIZES = [(size, tp) for size in (1, 2, 3, 5, 7, 8, 64, 151_677) for tp in (1, 2, 3, 4, 8)]


@pytest.mark.parametrize("size,tp", SIZES)
def test_padded_spans_follow_one_another_and_are_equally_large(size: int, tp: int) -> None:
    spans = [split.padded(size) for split in splits(tp)]
    assert [place for span in spans for place in range(span.start, span.stop)] == list(range(size))
    assert {span.size for span in spans} == {-(-size // tp)}
    assert all(0 <= span.start <= span.stop <= size for span in spans)


def test_the_last_rank_may_have_padding_only() -> None:
    assert [split.padded(5) for split in splits(4)] == [Span(0, 2, 2), Span(2, 4, 2), Span(4, 5, 2), Span(5, 5, 2)]


def test_each_rank_keeps_the_kv_heads_that_its_queries_attend_with() -> None:
    for kv_heads, tp, per_kv in ((4, 2, 3), (4, 4, 1), (2, 4, 2), (2, 8, 4), (1, 3, 3), (3, 6, 2), (8, 2, 1)):
        heads = kv_heads * per_kv
        for split in splits(tp, replicate_kv_heads=True):
            query, kv = split.query_heads(heads, 1), split.kv_heads(kv_heads, 1)
            wanted = [head // per_kv for head in range(query.start, query.stop)]
            found = [kv.start + head // (query.size // kv.size) for head in range(query.size)]
            assert found == wanted, (kv_heads, tp, split.group.rank)


def test_heads_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="num_attention_heads 6 is not divisible by tp 4"):
        splits(4)[0].query_heads(6, 8)
    with pytest.raises(ValueError, match="num_key_value_heads 2 is not divisible by tp 4"):
        splits(4)[0].kv_heads(2, 8)  # copies only when asked for
    with pytest.raises(ValueError, match="num_key_value_heads 3 is not divisible by tp 4"):
        splits(4, replicate_kv_heads=True)[0].kv_heads(3, 8)


@pytest.mark.parametrize("vocab_size,tp", [(1, 2), (5, 4), (7, 2), (40, 4), (677, 4), (9, 8)])
def test_embedding_and_head_add_up(vocab_size: int, tp: int) -> None:
    table, ids, hidden = torch.randn(vocab_size, 6), torch.arange(vocab_size).repeat(2), torch.randn(3, 6)
    rows, logits = [], []
    for split in splits(tp):
        part = VocabParallel(vocab_size, 6, split)
        part.weight.data.zero_()
        span = part.span
        part.weight.data[: span.stop - span.start] = table[span.start : span.stop]
        rows.append(part.embed(ids))
        logits.append(F.linear(hidden, part.weight))
    assert torch.equal(torch.stack(rows).sum(0), table[ids]), "one rank has the row and the others add zeros"
    assert torch.allclose(torch.cat(logits, dim=-1)[:, :vocab_size], F.linear(hidden, table))


def test_the_gathered_logits_end_with_the_vocabulary() -> None:
    class Whole(Part):
        def gather(self, x: torch.Tensor, kind: str) -> torch.Tensor | None:
            return torch.cat([x] * self.size, dim=-1) if self.rank == 0 else None

    heads = [VocabParallel(7, 6, Split(group=Whole(rank, 4))) for rank in range(4)]
    found = [head.logits(torch.randn(3, 6, dtype=torch.float32)) for head in heads]
    assert found[0] is not None and found[0].shape == (3, 7) and found[0].dtype == torch.float32
    assert found[1:] == [None] * 3


@pytest.mark.parametrize("width,tp", [(8, 2), (5, 4), (7, 3), (1, 2)])
def test_columns_then_rows_add_up_and_the_bias_counts_once(width: int, tp: int, tmp_path: Path) -> None:
    shapes = {f"{name}.weight": (width, 6) for name in ("gate", "up")} | {f"{name}.bias": (width,) for name in ("gate", "up")}
    tensors = save_checkpoint(tmp_path, shapes | {"down.weight": (6, width), "down.bias": (6,)})

    class Doubling(Part):
        """Stands for a sum of which this part is a half, so that what is added before it shows."""

        def all_reduce(self, x: torch.Tensor, kind: str) -> torch.Tensor:
            return 2 * x

    x, outputs = torch.randn(4, 6), []
    for split in (Split(group=Doubling(rank, tp)) for rank in range(tp)):
        span = split.padded(width)
        column = ColumnParallelLinear(6, {"gate": (span, width), "up": (span, width)}, bias=True)
        row = RowParallelLinear("down", span, width, 6, bias=True, group=split.group)
        for parameter in (*column.parameters(), *row.parameters()):
            parameter.data.fill_(float("nan"))
        load_weights(tmp_path, dict([*column.targets(""), *row.targets("")]))
        gate, up = column(x).split(span.size, dim=-1)
        outputs.append((row(F.silu(gate) * up) - tensors["down.bias"]) / 2)
    gate, up = (F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in ("gate", "up"))
    want = F.linear(F.silu(gate) * up, tensors["down.weight"], tensors["down.bias"])
    assert torch.allclose(torch.stack(outputs).sum(0) + tensors["down.bias"], want, atol=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_the_union_of_all_ranks_is_the_checkpoint_bit_for_bit(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    tp = rng.choice((1, 2, 3, 4, 6, 8))
    text = random_text_config(rng, tp)
    ranks = [build(text, split) for split in splits(tp, replicate_kv_heads=True)]
    stored = save_checkpoint(tmp_path, full_shapes(ranks[0]))
    for decoder in ranks:
        load_weights(tmp_path, decoder.targets())
        assert not any(parameter.isnan().any() for parameter in decoder.parameters()), "padding is zero"
    for name, tensor in stored.items():
        found, owners = torch.full_like(tensor, float("nan")), torch.zeros_like(tensor)
        for decoder in ranks:
            target = decoder.targets()[name]
            spans = {} if isinstance(target, torch.Tensor) else target.spans
            kept = target if isinstance(target, torch.Tensor) else target.tensor
            there = tuple(slice(spans[d].start, spans[d].stop) if d in spans else slice(None) for d in range(tensor.ndim))
            here = tuple(slice(spans[d].stop - spans[d].start) if d in spans else slice(None) for d in range(tensor.ndim))
            part = kept[here]
            assert torch.equal(part, tensor[there]), f"{name} of rank {decoder.split.group.rank}"
            assert kept.count_nonzero() == part.count_nonzero(), "beyond it there are zeros"
            found[there] = part
            owners[there] += 1
        assert torch.equal(found, tensor), name
        copies = {int(n) for n in owners.unique()}
        if name.endswith(("norm.weight", "o_proj.bias", "down_proj.bias")):
            assert copies == {tp}, name
        elif "k_proj" in name or "v_proj" in name:
            assert copies == {max(1, tp // text["num_key_value_heads"])}, name
        else:
            assert copies == {1}, name


def test_every_rank_has_parameters_of_the_same_shapes() -> None:
    rng = random.Random(0)
    for _ in range(20):
        tp = rng.choice((2, 3, 4, 8))
        text = random_text_config(rng, tp)
        ranks = [build(text, split) for split in splits(tp, replicate_kv_heads=True)]
        assert len({tuple(tuple(p.shape) for p in decoder.parameters()) for decoder in ranks}) == 1
        assert len({tuple(sorted(full_shapes(decoder).items())) for decoder in ranks}) == 1
