"""Attention within a window equals its definition written out, by torch's operators and by the kernel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.kernels.attention.test_triton import attend, poison_what_is_past_the_end
from tests.kernels.bfloat16 import compute_bfloat16
from tests.kernels.caches import DEVICE, KINDS, paged
from tests.kernels.errors import TOLERANCE, rms_ratio
from vlserve.kernels.attention import paged_attention
from vlserve.kernels.attention import plan as attention_plan
from vlserve.kernels.attention.reference import paged_attention_ref

Mix = tuple[tuple[int, ...], tuple[int, ...]]
MIXES: list[Mix] = [
    ((1, 1, 1), (1, 63, 129)),
    ((1, 1, 1, 1), (40, 40, 40, 40)),
    ((1, 7, 1, 63, 2), (63, 7, 1, 129, 2)),
    ((5,), (129,)),
]
WINDOWS = (1, 32, 100, 4000)


def defined(plain: list[tuple[torch.Tensor, ...]], group: int, scale: float, window: int) -> torch.Tensor:
    """In float64 and contiguous."""
    want = []
    for q, k, v in plain:
        k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))[None]
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
        hidden = (distance < 0) | (distance >= window)
        want.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v))
    return torch.cat(want)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_operators(mix: Mix, window: int, dtype: torch.dtype) -> None:
    query, keys, values, metadata, plain = paged(*mix, heads=6, kv_heads=2, dim=64, size=5, dtype=dtype)
    want = defined(plain, 3, 0.125, window)
    for operation in (paged_attention, paged_attention_ref):
        got = operation(query, keys, values, metadata, 0.125, window=window)
        assert rms_ratio(got, want) < TOLERANCE[dtype], operation.__name__


@pytest.mark.parametrize("chunk", (None, 1))
@pytest.mark.parametrize("window", (1, 20, 70))
def test_the_kernel(window: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With contexts in parts of one tile there are parts of which a row sees nothing, before its window and behind it."""
    check(((1, 7, 2), (63, 9, 90)), window, chunk, torch.float32, None, monkeypatch)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_the_kernel_with_other_types(kind: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check(((1, 9), (200, 90)), 70, 1, torch.float16, kind, monkeypatch)
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
    check(((1, 9), (150, 90)), 5, None, torch.bfloat16, kind, monkeypatch)
    check(((1, 3), (150, 90)), 70, 1, torch.bfloat16, kind, monkeypatch, dim=128)


def check(
    mix: Mix, window: int, chunk: int | None, dtype: torch.dtype, kind: Any, monkeypatch: pytest.MonkeyPatch, dim: int = 64
) -> None:
    if chunk is not None:
        monkeypatch.setattr(attention_plan, "choose_chunk", lambda *args, **kwargs: chunk)
    query, keys, values, metadata, _ = paged(*mix, heads=6, kv_heads=2, dim=dim, size=16, dtype=dtype, kind=kind)
    want = paged_attention_ref(query.double(), keys, values, metadata, dim**-0.5, window=window)
    for cache in (keys, values):
        poison_what_is_past_the_end(cache)
    got, _ = attend(query, keys, values, metadata, window=window)
    assert not got.isnan().any() and rms_ratio(got, want) < TOLERANCE[dtype]


def test_a_window_of_nothing_is_refused() -> None:
    query, keys, values, metadata, _ = paged((1,), (5,), heads=2, kv_heads=1, dim=16, size=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="a window of 0 tokens"):
        paged_attention(query, keys, values, metadata, 0.25, window=0)
