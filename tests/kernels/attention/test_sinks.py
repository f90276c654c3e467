"""Attention with sinks equals its definition written out, by torch's operators and by the kernel, in parts and in windows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.kernels.attention.test_triton import attend, attention_triton, poison_what_is_past_the_end
from tests.kernels.bfloat16 import compute_bfloat16
from tests.kernels.caches import DEVICE, KINDS, paged
from tests.kernels.errors import TOLERANCE, rms_ratio
from tests.rehearsal import interpreter
from vlserve.kernels.attention import paged_attention
from vlserve.kernels.attention import plan as attention_plan
from vlserve.kernels.attention.reference import paged_attention_ref

Mix = tuple[tuple[int, ...], tuple[int, ...]]
MIXES: list[Mix] = [
    ((1, 1, 1), (1, 63, 129)),
    ((1, 1), (40, 40)),
    ((1, 7, 1, 63), (63, 7, 1, 129)),
]
FP16, BF16, INT8, FP8 = torch.float16, torch.bfloat16, torch.int8, torch.uint8
TYPES = [  # with codes, and whether E4M3 is read by the GPU itself
    *((FP16, kind, False) for kind in (None, INT8, FP8)),
    *((BF16, kind, False) for kind in (None, INT8, FP8)),
    (FP16, FP8, True),
    (BF16, FP8, True),
]
HEADS = 6  # of queries; two KV heads
SINKS = torch.tensor([-30.0, -1.0, 0.0, 1.5, 4.0, 60.0])  # next to none, as much as some scores, and all of the weight


def defined(plain: list[tuple[torch.Tensor, ...]], scale: float, window: int | None) -> torch.Tensor:
    """In float64 and contiguous, by powers of e."""
    want = []
    for q, k, v in plain:
        k, v = (t.double().repeat_interleave(HEADS // 2, 1) for t in (k, v))
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))[None]
        powers = (torch.einsum("qhd,khd->hqk", q.double(), k) * scale).exp()
        powers = powers.masked_fill((distance < 0) | (distance >= (window or math.inf)), 0)
        weights = powers / (powers.sum(-1, keepdim=True) + SINKS.double().exp()[:, None, None])
        want.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(want)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest of the heads', since a sink makes a head's numbers small."""
    return max(rms_ratio(got[:, head], want[:, head]) for head in range(HEADS - 1)) + float(got[:, -1].abs().max())


@pytest.mark.parametrize("window", (None, 1, 32))
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_operators(mix: Mix, window: int | None, dtype: torch.dtype) -> None:
    query, keys, values, metadata, plain = paged(*mix, heads=HEADS, kv_heads=2, dim=64, size=5, dtype=dtype)
    want = defined(plain, 0.125, window)
    for operation in (paged_attention, paged_attention_ref):
        got = operation(query, keys, values, metadata, 0.125, window=window, sinks=SINKS)
        assert got.dtype == dtype and error(got, want) < TOLERANCE[dtype], operation.__name__


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_operators_with_codes(kind: torch.dtype) -> None:
    shape = {"heads": HEADS, "kv_heads": 2, "dim": 64, "size": 5}
    query, keys, values, metadata, _ = paged((1, 9), (40, 90), **shape, dtype=torch.float32, kind=kind)
    want = paged_attention_ref(query.double(), keys, values, metadata, 0.125, window=20, sinks=SINKS)
    got = paged_attention(query, keys, values, metadata, 0.125, window=20, sinks=SINKS)
    assert error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("chunk", (None, 1))
@pytest.mark.parametrize("window", (None, 20))
def test_the_kernel(window: int | None, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context in parts has its sink once: at the merge."""
    check(((1, 7, 2), (63, 9, 90)), window, chunk, torch.float32, None, monkeypatch)


@pytest.mark.parametrize("window", (None, 9))
def test_the_kernel_with_small_pages(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    check(((1, 5), (40, 90)), window, None, torch.float32, None, monkeypatch, size=8)


@pytest.mark.parametrize("dtype,kind,is_native", TYPES, ids=str)
def test_the_kernel_with_other_types(
    dtype: torch.dtype, kind: torch.dtype | None, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16, 32 and 128 rows. LIFT is in the weights' sum where float16 has codes, and in the sink's."""
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
        interpreter.install(monkeypatch)
        monkeypatch.setattr(attention_triton, "reads_e4m3", lambda x: is_native)
    for window in (None, 70):
        check(((1, 5), (150, 90)), window, 1, dtype, kind, monkeypatch)
    check(((9,), (90,)), 70, None, dtype, kind, monkeypatch)
    check(((20,), (50,)), None, None, dtype, kind, monkeypatch)


def check(
    mix: Mix,
    window: int | None,
    chunk: int | None,
    dtype: torch.dtype,
    kind: Any,
    monkeypatch: pytest.MonkeyPatch,
    size: int = 16,
) -> None:
    with monkeypatch.context() as patch:
        if chunk is not None:
            patch.setattr(attention_plan, "choose_chunk", lambda *args, **kwargs: chunk)
        shape = {"heads": HEADS, "kv_heads": 2, "dim": 64, "size": size}
        query, keys, values, metadata, _ = paged(*mix, **shape, dtype=dtype, kind=kind)
        want = paged_attention_ref(query.double(), keys, values, metadata, 0.125, window=window, sinks=SINKS)
        for cache in (keys, values):
            poison_what_is_past_the_end(cache)
        got, there = attend(query, keys, values, metadata, window=window, sinks=SINKS)
    assert not got.isnan().any() and error(got, want) < TOLERANCE[dtype]
    (launches,) = there.launches.values()
    assert chunk is None or any(launch.num_merges for launch in launches)
