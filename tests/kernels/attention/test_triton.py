"""Triton's attention equals its definition: interpreted on the CPU, compiled where there is a GPU.

Caches hold 16 or 32 bits a number, or codes. What no sequence owns, and what lies past a sequence's end, is NaN.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.caches import DEVICE, KINDS, moved, paged
from tests.kernels.errors import TOLERANCE, rms_ratio
from vlserve.kernels.attention import plan as attention_plan
from vlserve.kernels.attention.reference import paged_attention_ref
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache.types import Blocks, QuantizedBlocks

pytest.importorskip("triton")
from tests.kernels.bfloat16 import compute_bfloat16

attention_triton: Any = pytest.importorskip("vlserve.kernels.attention.triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CACHES = [pytest.param(None, id="same"), *KINDS]
Mix = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)


def poison_what_is_past_the_end(blocks: Blocks) -> None:
    """`paged` has left zeros there, and no token of its own is all zeros."""
    numbers, scales = (blocks.codes, blocks.scales) if isinstance(blocks, QuantizedBlocks) else (blocks, blocks)
    scales[(numbers == 0).all(-1)] = float("nan")


def attend(
    query: torch.Tensor,
    keys: Blocks,
    values: Blocks,
    metadata: AttentionMetadata,
    *,
    num_sms: int = 16,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, AttentionMetadata]:
    """The result, and the metadata with its launches."""
    there = replace(metadata, block_tables=metadata.block_tables.to(DEVICE), launches={})
    caches = moved(keys), moved(values)
    sinks = None if sinks is None else sinks.to(DEVICE)
    options = {"num_sms": num_sms, "window": window, "sinks": sinks}
    got = attention_triton.paged_attention_triton(query.to(DEVICE), *caches, there, query.shape[-1] ** -0.5, **options)
    return got.cpu(), there


def check(mix: Mix, heads: int, kv_heads: int, dim: int, size: int, dtype: torch.dtype, kind: torch.dtype | None) -> list[Any]:
    query, keys, values, metadata, _ = paged(*mix, heads=heads, kv_heads=kv_heads, dim=dim, size=size, dtype=dtype, kind=kind)
    want = paged_attention_ref(query.double(), keys, values, metadata, dim**-0.5)
    for cache in (keys, values):
        poison_what_is_past_the_end(cache)
    got, there = attend(query, keys, values, metadata)
    assert got.dtype == dtype and rms_ratio(got, want) < TOLERANCE[dtype]
    (launches,) = there.launches.values()
    return launches


SHAPES = [  # query_lens and context_lens, query heads, KV heads, head_dim, page
    pytest.param(((1, 1, 1), (1, 33, 200)), 14, 2, 64, 16, id="decode 14/2"),
    pytest.param(((1, 7, 1, 18), (40, 7, 1, 50)), 8, 4, 80, 5, id="mixed 8/4"),
    pytest.param(((3, 1), (34, 32)), 16, 8, 96, 128, id="mixed 16/8"),
    pytest.param(((1, 3), (65, 90)), 40, 8, 128, 16, id="mixed 40/8"),
    pytest.param(((2,), (65,)), 24, 1, 24, 64, id="prefill 24/1"),
]


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix,heads,kv_heads,dim,size", SHAPES)
def test_it_equals_its_definition(
    mix: Mix, heads: int, kv_heads: int, dim: int, size: int, dtype: torch.dtype, kind: torch.dtype | None
) -> None:
    check(mix, heads, kv_heads, dim, size, dtype, kind)


@pytest.mark.parametrize(
    "dtype,kind",
    [
        (torch.float32, None),
        (torch.float16, None),
        (torch.float16, torch.int8),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.uint8),
    ],
    ids=str,
)
@pytest.mark.parametrize("mix", [((1, 1), (150, 300)), ((4, 2), (387, 70))], ids=str)
def test_parts_of_a_context_merge(
    mix: Mix, dtype: torch.dtype, kind: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last part of 387 positions begins within the queries, so that some rows see nothing of it."""
    monkeypatch.setattr(attention_plan, "choose_chunk", lambda *args, **kwargs: 1)
    (launch,) = check(mix, 14, 2, 64, 16, dtype, kind)
    assert launch.num_merges and launch.num_items > 2 * launch.num_sequences


@pytest.mark.parametrize("mix", [((1, 1), (150, 300)), ((2, 2), (100, 70))], ids=str)
def test_parts_merge_with_heads_of_128(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "choose_chunk", lambda *args, **kwargs: 1)
    (launch,) = check(mix, 4, 2, 128, 16, torch.bfloat16, None)
    assert launch.num_merges


def test_scores_far_apart_do_not_overflow() -> None:
    query, keys, values, metadata, _ = paged((1, 3), (200, 90), heads=4, kv_heads=2, dim=64, size=16, dtype=torch.float16)
    query *= 100
    want = paged_attention_ref(query.double(), keys, values, metadata, 0.125)
    got, _ = attend(query, keys, values, metadata)
    assert rms_ratio(got, want) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", (1e-3, 3e4))
def test_the_smallest_and_largest_values_of_float16_survive_their_codes(size: float, kind: torch.dtype) -> None:
    query, keys, values, metadata, _ = paged((1,), (100,), heads=2, kv_heads=1, dim=64, size=16, dtype=torch.float16, kind=kind)
    assert isinstance(values, QuantizedBlocks)
    values = replace(values, scales=values.scales * (size / 4))
    want = paged_attention_ref(query.double(), keys, values, metadata, 0.125)
    got, _ = attend(query, keys, values, metadata)
    rounding = 2.0**-25  # float16's smallest numbers are twice as far apart
    assert (got - want).abs().max() < TOLERANCE[torch.float16] * want.abs().max() + 1.01 * rounding


@pytest.mark.skipif(DEVICE == "cuda", reason="takes nine gigabytes of a GPU's memory; here untouched pages take none")
def test_blocks_beyond_two_to_the_31_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)  # copies tensors to themselves
    query, keys, values, metadata, _ = paged((1, 2), (20, 40), heads=2, kv_heads=1, dim=64, size=16, dtype=torch.float16)
    want = paged_attention_ref(query.double(), keys, values, metadata, 0.125)
    assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
    far = 2**31 // keys[0].numel() + 7
    many = torch.empty(far + 2 * len(keys), *keys.shape[1:], dtype=torch.float16)
    many[far : far + len(keys)], many[far + len(keys) :] = keys, values
    there = replace(metadata, block_tables=metadata.block_tables + far)
    got, _ = attend(query, many, many[len(keys) :], there)
    assert rms_ratio(got, want) < TOLERANCE[torch.float16]


def test_a_step_is_planned_once_for_all_layers() -> None:
    query, keys, values, metadata, _ = paged((1,), (5,), heads=2, kv_heads=1, dim=16, size=16, dtype=torch.float32)
    _, there = attend(query, keys, values, metadata)
    (planned,) = there.launches.values()
    attention_triton.paged_attention_triton(query.to(DEVICE), moved(keys), moved(values), there, 0.25, num_sms=16)
    assert next(iter(there.launches.values())) is planned
