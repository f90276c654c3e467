"""Attention in the tiles that real models launch: 128 rows of a prompt, by type, dimension and architecture."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention.test_triton import attend, attention_triton, poison_what_is_past_the_end
from tests.kernels.bfloat16 import compute_bfloat16
from tests.kernels.caches import DEVICE, KINDS, paged
from tests.kernels.errors import TOLERANCE, rms_ratio
from vlserve.kernels.attention import plan as attention_plan
from vlserve.kernels.attention.reference import paged_attention_ref


@pytest.mark.parametrize("kind", [pytest.param(None, id="same"), *KINDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim,arch", [(64, 90), (128, 80), (128, 90), (128, 120)])
def test_it_equals_its_definition(
    dim: int, arch: int, dtype: torch.dtype, kind: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
        monkeypatch.setattr(attention_plan, "INTERPRETERS", (8, arch))
        monkeypatch.setattr(attention_triton, "reads_e4m3", lambda x: arch >= 89)
    query, keys, values, metadata, _ = paged((1, 40), (70, 44), heads=6, kv_heads=2, dim=dim, size=16, dtype=dtype, kind=kind)
    windows = (None, 30) if kind is None and dtype == torch.bfloat16 else (None,)
    wanted = [paged_attention_ref(query.double(), keys, values, metadata, dim**-0.5, window=window) for window in windows]
    for cache in (keys, values):
        poison_what_is_past_the_end(cache)
    for window, want in zip(windows, wanted, strict=True):
        got, there = attend(query, keys, values, metadata, window=window)
        assert not got.isnan().any() and rms_ratio(got, want) < TOLERANCE[dtype]
        ((_, prompt),) = there.launches.values()
        assert prompt.tiling.rows == 128
