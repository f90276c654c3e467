"""Attention in the tiles that real models launch: 128 rows of a prompt, by type, dimension and architecture; whole and in parts."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention.test_triton import attend, attention_triton, poison_what_is_past_the_end
from tests.kernels.bfloat16 import compute_bfloat16
from tests.kernels.caches import DEVICE, KINDS, paged, tensors
from tests.kernels.errors import TOLERANCE, rms_ratio
from vlserve.kernels.attention import plan as attention_plan
from vlserve.kernels.attention.reference import paged_attention_ref
from vlserve.kernels.kv_cache.types import Blocks


@pytest.mark.parametrize("kind", [pytest.param(None, id="same"), *KINDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim,arch", [(64, 90), (128, 80), (128, 90)])
def test_it_equals_its_definition(
    dim: int, arch: int, dtype: torch.dtype, kind: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
        monkeypatch.setattr(attention_plan, "INTERPRETERS", (8, arch))
        monkeypatch.setattr(attention_triton, "reads_e4m3", lambda x: arch >= 89)
    query, keys, values, metadata, _ = paged((1, 40), (150, 90), heads=6, kv_heads=2, dim=dim, size=16, dtype=dtype, kind=kind)
    cut = attention_plan.choose_chunk
    for window, chunk in ((None, None), (None, 1), (70, None), (70, 1)):
        monkeypatch.setattr(attention_plan, "choose_chunk", cut if chunk is None else lambda *args, **kwargs: 1)
        want = paged_attention_ref(query.double(), keys, values, metadata, dim**-0.5, window=window)
        for cache in (keys, values):
            poison_what_is_past_the_end(cache)
        got, there = attend(query, keys, values, metadata, window=window)
        assert not got.isnan().any() and rms_ratio(got, want) < TOLERANCE[dtype]
        ((decodes, prompt),) = there.launches.values()
        assert prompt.tiling.rows == 128 and bool(prompt.num_merges and decodes.num_merges) == (chunk == 1)
        for cache in (keys, values):
            heal(cache)


def heal(blocks: Blocks) -> None:
    """The definition multiplies what is past the end by nought."""
    for tensor in tensors(blocks):
        if tensor.is_floating_point():
            tensor.nan_to_num_(0)
