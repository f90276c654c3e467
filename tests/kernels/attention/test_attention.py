"""Attention over the paged cache equals attention written out in float64, with keys and values as they are and in eight bits."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.caches import KINDS, paged
from tests.kernels.errors import DTYPES, TOLERANCE, rms_ratio
from vlserve.kernels.attention import paged_attention, plan_attention
from vlserve.kernels.attention.reference import paged_attention_ref

MIXES = [
    ((1,), (1,)),
    ((1, 1, 1), (1, 63, 129)),
    ((1, 1, 1, 1, 1), (33, 60, 17, 49, 64)),
    ((7,), (7,)),
    ((5,), (129,)),
    ((1, 7, 1, 63, 2), (63, 7, 1, 129, 2)),
    ((3, 1), (64, 64)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,dim", [(4, 4, 8), (6, 2, 64), (14, 2, 80), (8, 1, 128)])
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("size", (16, 5))
def test_paged_attention_equals_contiguous(
    mix: tuple[tuple[int, ...], tuple[int, ...]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, size: int
) -> None:
    query, keys, values, metadata, plain = paged(*mix, heads=heads, kv_heads=kv_heads, dim=dim, size=size, dtype=dtype)
    want = []
    for q, k, v in plain:  # float64, contiguous, written out
        k, v = (t.double().repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * dim**-0.5
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        want.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
    for operation in (paged_attention, paged_attention_ref):
        got = operation(query, keys, values, metadata, dim**-0.5)
        assert not got.isnan().any()
        assert rms_ratio(got, torch.cat(want)) < TOLERANCE[dtype], operation.__name__


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", [((1, 1, 1), (1, 63, 129)), ((5,), (129,)), ((1, 7, 1, 63, 2), (63, 7, 1, 129, 2))], ids=str)
@pytest.mark.parametrize("heads,kv_heads,dim,size", [(6, 2, 64, 16), (14, 2, 80, 5)])
def test_paged_attention_equals_its_definition_in_float64(
    mix: tuple[tuple[int, ...], tuple[int, ...]],
    heads: int,
    kv_heads: int,
    dim: int,
    size: int,
    dtype: torch.dtype,
    kind: torch.dtype,
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "size": size}
    query, keys, values, metadata, plain = paged(*mix, **shape, dtype=dtype, kind=kind)
    want = paged_attention_ref(query.double(), keys, values, metadata, dim**-0.5)
    assert not want.isnan().any()
    for operation in (paged_attention, paged_attention_ref):
        got = operation(query, keys, values, metadata, dim**-0.5)
        assert got.dtype == dtype and rms_ratio(got, want) < TOLERANCE[dtype], operation.__name__
    exact = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                *(t.double().transpose(0, 1) for t in (q, k, v)),
                attn_mask=torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q)),
                enable_gqa=True,
            ).transpose(0, 1)
            for q, k, v in plain
        ]
    )
    assert rms_ratio(want, exact) < {torch.int8: 0.015, torch.uint8: 0.05}[kind]


def test_a_context_shorter_than_its_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 0 has 3 query tokens in a context of 2"):
        plan_attention(
            query_lens=(3,),
            context_lens=(2,),
            block_tables=torch.zeros(1, 1, dtype=torch.int64),
            slots=torch.zeros(3),
            block_size=4,
        )
