"""Attention in the tilings that small models launch: 16, 32 and 128 rows, and heads that fill their block and that do not."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention.test_triton import attend, attention_triton, poison_what_is_past_the_end
from tests.kernels.bfloat16 import compute_bfloat16
from tests.kernels.caches import DEVICE, paged
from tests.kernels.errors import TOLERANCE, rms_ratio
from tests.rehearsal import interpreter
from vlserve.kernels.attention import plan as attention_plan
from vlserve.kernels.attention.reference import paged_attention_ref

FP32, FP16, BF16, INT8, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8
CASES = [  # type, codes, head_dim, whether E4M3 is read by the GPU itself
    (FP32, None, 8, False),
    (FP32, None, 16, False),
    (FP32, INT8, 16, False),
    (FP16, None, 8, False),
    (FP16, None, 16, False),
    (FP16, FP8, 16, False),
    (FP16, FP8, 16, True),
    (BF16, None, 8, False),
    (BF16, INT8, 16, False),
    (BF16, FP8, 8, False),
    (BF16, FP8, 8, True),
]
TOKENS = (2, 10, 17)  # of a prompt beside a decode: with a group of 2 for 16, 32 and 128 rows


@pytest.mark.parametrize("dtype,kind,dim,is_native", CASES, ids=str)
def test_it_equals_its_definition(
    dtype: torch.dtype, kind: torch.dtype | None, dim: int, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a context of two tiles, which are two parts beside prompts of 32 rows; in float32 in a window too."""
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
        interpreter.install(monkeypatch)
        monkeypatch.setattr(attention_triton, "reads_e4m3", lambda x: is_native)
    windows, tokens = ((None, 9), TOKENS[:2]) if dtype is FP32 else ((None,), TOKENS)
    context, sizes = (20, (8, 16)) if dtype is FP32 else (130, (8,))
    rows = set()
    for count, window, size in ((count, window, size) for count in tokens for window in windows for size in sizes):
        given = {"heads": 2, "kv_heads": 1, "dim": dim, "size": size, "dtype": dtype, "kind": kind}
        query, keys, values, metadata, _ = paged((1, count), (context, context), **given)
        want = paged_attention_ref(query.double(), keys, values, metadata, dim**-0.5, window=window)
        for cache in (keys, values):
            poison_what_is_past_the_end(cache)
        with monkeypatch.context() as patch:
            if count == TOKENS[1]:
                patch.setattr(attention_plan, "choose_chunk", lambda *args, **kwargs: 1)
            got, there = attend(query, keys, values, metadata, window=window)
        assert not got.isnan().any() and rms_ratio(got, want) < TOLERANCE[dtype]
        ((decode, prompt),) = there.launches.values()
        assert bool(decode.num_merges and prompt.num_merges) == (count == TOKENS[1])
        rows.add(prompt.tiling.rows)
    assert len(rows) == len(tokens)
