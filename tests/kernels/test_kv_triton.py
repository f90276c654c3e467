"""Triton's kernels of the cache in eight bits equal the definitions: interpreted on the CPU, compiled where there is a GPU.

The interpreter is wrong in bfloat16, which is therefore left to a GPU; that it compiles is checked in test_compiled.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.test_kernels import TOLERANCE, paged, poisoned, rms_ratio, tensors
from tests.kernels.test_kv_codes import KINDS, awkward
from vlserve.kernels.kv_codes import Blocks, QuantizedBlocks
from vlserve.kernels.paged_attention import AttentionMetadata, paged_attention_ref
from vlserve.kernels.store_kv import store_kv_ref

pytest.importorskip("triton")
kv_triton: Any = pytest.importorskip("vlserve.kernels.kv_triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def moved(blocks: Blocks) -> QuantizedBlocks:
    return QuantizedBlocks(*(tensor.to(DEVICE) for tensor in tensors(blocks)))


def moved_metadata(metadata: AttentionMetadata) -> AttentionMetadata:
    return replace(metadata, **{name: getattr(metadata, name).to(DEVICE) for name in ("block_tables", "slots", "lengths")})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (8, 80))
def test_store_kv(dim: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    both = torch.cat((awkward(2, dim, dtype), awkward(2, dim, dtype)), 1)
    both[7, 3, 2] = float("nan")
    key, value = both[:, :2], both[:, 2:]  # cut from one tensor, as a layer's are
    slots = torch.randperm(40)[: len(key)]
    want = [poisoned((8, 5, 2, dim), dtype, kind) for _ in range(2)]
    got = [moved(poisoned((8, 5, 2, dim), dtype, kind)) for _ in range(2)]
    store_kv_ref(key, value, *want, slots)
    kv_triton.store_kv_triton(*(x.to(DEVICE) for x in (key, value)), *got, slots.to(DEVICE))
    for ours, (codes, scales) in zip(got, map(tensors, want), strict=True):
        torch.testing.assert_close(ours.scales.cpu(), scales, rtol=0, atol=0, equal_nan=True)
        is_whole = ~scales.isnan()
        assert torch.equal(ours.codes.cpu()[is_whole], codes[is_whole])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mix,heads,kv_heads,dim,size",
    [
        (((1, 1, 1), (1, 33, 70)), 14, 2, 64, 16),
        (((1, 7, 1, 18), (40, 7, 1, 50)), 6, 2, 80, 5),
        (((3, 1), (34, 32)), 4, 4, 8, 1),
        (((2,), (65,)), 24, 1, 24, 64),
    ],
)
def test_paged_attention(
    mix: tuple[tuple[int, ...], tuple[int, ...]],
    heads: int,
    kv_heads: int,
    dim: int,
    size: int,
    dtype: torch.dtype,
    kind: torch.dtype,
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "size": size}
    query, keys, values, metadata, _ = paged(*mix, **shape, dtype=dtype, kind=kind)
    want = paged_attention_ref(query.double(), keys, values, metadata, dim**-0.5)
    for cache in (keys, values):  # it looks at no slot past a sequence's end
        codes, scales = tensors(cache)
        scales[(codes == 0).all(-1)] = float("nan")
    got = kv_triton.paged_attention_triton(*(query.to(DEVICE), moved(keys), moved(values), moved_metadata(metadata)), dim**-0.5)
    assert got.dtype == dtype and rms_ratio(got.cpu(), want) < TOLERANCE[dtype]
