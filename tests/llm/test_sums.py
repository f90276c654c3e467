"""In a decode step with 4-bit weights norms and gate write the sums that products take: no kernel is launched for them alone.

Triton's kernels are interpreted, but for attention's, which torch's operators stand for.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from vlserve.kernels import gate, group_sums, int4_pairs, norms
from vlserve.kernels.attention import plan_attention
from vlserve.llm import formats_int4
from vlserve.llm.config_readers import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.formats_int4 import GroupedInt4Format, Int4Storage
from vlserve.llm.int4_packing import AWQ_GEMM
from vlserve.llm.kv_cache import KVCache
from vlserve.llm.tensor_parallel import Split

pytest.importorskip("triton")
from vlserve.kernels.gate import triton as gate_triton
from vlserve.kernels.group_sums import triton as sums_triton
from vlserve.kernels.int4_pairs import triton as pairs_triton
from vlserve.kernels.norms import triton as norms_triton

CPU, LAYERS = torch.device("cpu"), 2
# the feed-forward's width is not whole blocks of 128
TEXT = {"model_type": "qwen2", "vocab_size": 50, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": LAYERS}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64}


class Counting:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, launches: Counter[str], name: str) -> None:
        self.kernel, self.launches, self.name = kernel, launches, name

    def __getitem__(self, grid: Any) -> Any:
        self.launches[self.name] += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """By kernel; tensors on the CPU are treated as a small GPU's."""
    counted: Counter[str] = Counter()
    for module in (int4_pairs, formats_int4, group_sums, norms, gate):
        monkeypatch.setattr(module, "runs_triton", lambda x: True)
    monkeypatch.setattr(pairs_triton, "device_of", lambda index: ("sm_90", 2))
    kernels = {"norm": (norms_triton, "_rms_kernel"), "gate": (gate_triton, "_kernel"), "sums": (sums_triton, "_kernel")}
    for name, (module, kernel) in {**kernels, "product": (pairs_triton, "_matmul")}.items():
        monkeypatch.setattr(module, kernel, Counting(getattr(module, kernel), counted, name))
    return counted


def quantised(group: int, order: torch.Tensor | None = None) -> Decoder:
    decoder = Decoder(read_decoder_config(TEXT), Split()).half().requires_grad_(False)
    for _, linear in decoder.linears():
        old, form = linear.format, Int4Storage(layout=AWQ_GEMM, group=group)
        if order is not None and old.in_features == len(order):
            form = Int4Storage(layout=AWQ_GEMM, group=group, order=order)
        linear.format = GroupedInt4Format(old.in_span, old.in_features, old.outputs, form, torch.float16)
    for name, parameter in decoder.named_parameters():
        if name.endswith((".codes", ".zeros")):
            parameter.random_(0, 256 if name.endswith(".codes") else 16)
        elif name.endswith(".scales"):
            parameter.uniform_(0.001, 0.01)
        elif not name.endswith(".order"):
            parameter.normal_(1 if "norm" in name else 0, 0.1)
    decoder.finish()
    decoder.prepare(64, CPU)
    return decoder


def compute(decoder: Decoder, rows: int) -> torch.Tensor:
    """The hidden states of a step of `rows` tokens, of one sequence each."""
    cache = KVCache(decoder.cache_kinds, num_blocks=rows, block_size=4, dtype=torch.float16, device=CPU)
    slots = torch.arange(rows) * 4
    tables, ones = torch.arange(rows).unsqueeze(1), (1,) * rows
    metadata = plan_attention(query_lens=ones, context_lens=ones, block_tables=tables, slots=slots, block_size=4)
    return decoder(decoder.embed(torch.arange(rows) % 50), torch.zeros(rows, dtype=torch.int64), cache, metadata)


def tokens(decoder: Decoder, hidden: torch.Tensor) -> list[int]:
    logits = decoder.logits(hidden)
    assert logits is not None
    return logits.argmax(-1).tolist()


@pytest.mark.parametrize("rows,group", [(3, 64), (1, 32)])
def test_sums_are_launched_for_the_output_projection_alone(
    rows: int, group: int, launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = quantised(group)
    got = compute(decoder, rows)
    assert launches == {"norm": 2 * LAYERS + 1, "gate": LAYERS, "sums": LAYERS, "product": 4 * LAYERS}
    monkeypatch.setattr(GroupedInt4Format, "empty_sums", lambda self, x: None)
    launches.clear()
    want = compute(decoder, rows)
    assert launches == {"norm": 2 * LAYERS + 1, "gate": LAYERS, "sums": 4 * LAYERS, "product": 4 * LAYERS}
    assert got.isfinite().all() and tokens(decoder, got) == tokens(decoder, want)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_products_of_more_rows_take_none(launches: Counter[str]) -> None:
    decoder = quantised(64)
    x = torch.zeros(129, 1).half()
    for _, linear in decoder.linears():
        assert linear.format.empty_sums(x) is None and linear.format.empty_sums(x[1:]) is not None


def test_inputs_in_another_order_are_summed_after_it(launches: Counter[str]) -> None:
    decoder = quantised(64, order=torch.randperm(128))
    assert compute(decoder, 2).isfinite().all()
    assert launches["sums"] == 3 * LAYERS, "qkv_proj's, gate_up_proj's and o_proj's"


def test_where_triton_does_not_run_nothing_takes_sums() -> None:
    x = torch.zeros(1, 1).half()
    for decoder in (quantised(64), Decoder(read_decoder_config(TEXT), Split())):
        assert all(linear.format.empty_sums(x) is None for _, linear in decoder.linears())
