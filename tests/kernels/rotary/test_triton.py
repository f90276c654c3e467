"""What comes before attention, with the codes that it writes, equals its definition; interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.caches import DEVICE, KINDS, awkward, moved, poisoned, tensors
from tests.kernels.errors import TOLERANCE, rms_ratio
from vlserve.kernels.kv_cache.reference import dequantize_ref, quantize_ref
from vlserve.kernels.kv_cache.types import LARGEST, Blocks, QuantizedBlocks
from vlserve.kernels.norms.reference import rms_norm_ref
from vlserve.kernels.rope import RopeConfig
from vlserve.kernels.rotary import rotary_store
from vlserve.kernels.rotary.reference import rotary_ref, rotary_store_ref
from vlserve.kernels.rotary.table import rotary_table

pytest.importorskip("triton")
from tests.kernels.bfloat16 import compute_bfloat16
from vlserve.kernels.rotary import triton as rotary_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CACHES = [pytest.param(None, id="same"), *KINDS]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)


def is_written(blocks: Blocks) -> torch.Tensor:
    """Of each slot and head, [N, S, HK]."""
    return ~(blocks.scales.isnan() if isinstance(blocks, QuantizedBlocks) else blocks.isnan().any(-1))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads,kv_heads,dim,has_norms",
    [
        (14, 2, 64, False),
        (8, 2, 128, False),
        (6, 3, 16, True),
        (5, 1, 80, True),
        (4, 4, 8, True),
        (4, 2, 12, True),
        (4, 1, 12, False),
        (3, 3, 12, False),
    ],
)
def test_rotary_store(heads: int, kv_heads: int, dim: int, has_norms: bool, dtype: torch.dtype, kind: torch.dtype | None) -> None:
    qkv = torch.randn(9, (heads + 2 * kv_heads) * dim).to(dtype)  # cut from one tensor, as a layer's are
    slots, positions = torch.randperm(40)[:9], torch.randint(0, 5000, (9,))
    cos_sin = rotary_table(RopeConfig(head_dim=dim), 5000)[positions].unbind(1)
    norms = (torch.rand(dim).to(dtype) + 0.5, torch.rand(dim).to(dtype) + 0.5) if has_norms else None
    there = [t.to(DEVICE) for t in (qkv, *cos_sin, slots)]
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    parts = [part.unflatten(-1, (-1, dim)) for part in there[0].split(sizes, -1)]
    caches = moved(poisoned((8, 5, kv_heads, dim), dtype, kind)), moved(poisoned((8, 5, kv_heads, dim), dtype, kind))
    moved_norms = None if norms is None else (norms[0].to(DEVICE), norms[1].to(DEVICE))
    got = rotary_triton.rotary_store_triton(*parts, (there[1], there[2]), caches, there[3], moved_norms, 1e-6)

    query, key, value = (part.double().unflatten(-1, (-1, dim)) for part in qkv.split(sizes, -1))
    if norms is not None:
        query, key = rms_norm_ref(query, norms[0].double(), 1e-6), rms_norm_ref(key, norms[1].double(), 1e-6)
    assert got.dtype == dtype and rms_ratio(got.cpu(), rotary_ref(query, *cos_sin)) < TOLERANCE[dtype]
    for cache, want in zip(caches, (rotary_ref(key, *cos_sin), value), strict=True):
        mask = is_written(cache).flatten(0, 1).cpu()
        assert mask.sum() == 9 * kv_heads and mask[slots].all()
        stored = cache if isinstance(cache, torch.Tensor) else dequantize_ref(cache, torch.float64)
        exact = (
            want if kind is None else dequantize_ref(QuantizedBlocks(*quantize_ref(want.to(torch.float32), kind)), torch.float64)
        )
        error = rms_ratio(stored.cpu().flatten(0, 1)[slots], exact)
        assert error < max(TOLERANCE[dtype], 0 if kind is None else 1 / LARGEST[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (8, 80))
def test_codes_are_those_of_the_definition(dim: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Keys are turned by nothing; numbers range from nought and the tiniest to outliers and NaN."""
    both = torch.cat((awkward(2, dim, dtype), awkward(2, dim, dtype)), 1)
    both[7, 3, 2] = float("nan")
    key, value = both[:, :2], both[:, 2:]
    slots = torch.randperm(40)[: len(key)]
    still = torch.ones(len(key), dim // 2), torch.zeros(len(key), dim // 2)
    want = poisoned((8, 5, 2, dim), dtype, kind), poisoned((8, 5, 2, dim), dtype, kind)
    got = moved(want[0]), moved(want[1])
    rotary_store_ref(key, key, value, still, want, slots)
    there = [t.to(DEVICE) for t in (key, key, value, *still, slots)]
    rotary_triton.rotary_store_triton(*there[:3], (there[3], there[4]), got, there[5])
    for ours, (codes, scales) in zip(got, map(tensors, want), strict=True):
        assert isinstance(ours, QuantizedBlocks)
        torch.testing.assert_close(ours.scales.cpu(), scales, rtol=0, atol=0, equal_nan=True)
        is_whole = ~scales.isnan()
        assert torch.equal(ours.codes.cpu()[is_whole], codes[is_whole])


@pytest.mark.parametrize("kind", CACHES)
def test_torchs_form_of_rotary_store(kind: torch.dtype | None) -> None:
    query, key, value = torch.randn(7, 6, 16), torch.randn(7, 2, 16), torch.randn(7, 2, 16)
    cos, sin = rotary_table(RopeConfig(head_dim=16), 7).unbind(1)
    norms, slots = (torch.rand(16), torch.rand(16)), torch.randperm(20)[:7]
    caches = [tuple(poisoned((4, 5, 2, 16), torch.float32, kind) for _ in range(2)) for _ in range(2)]
    got, want = (
        form(query, key, value, (cos, sin), pair, slots, norms, 1e-6)
        for form, pair in zip((rotary_store, rotary_store_ref), caches, strict=True)
    )
    assert rms_ratio(got, want) < TOLERANCE[torch.float32]
    for ours, theirs in zip(*caches, strict=True):
        assert torch.equal(is_written(ours), is_written(theirs))
        ours, theirs = (b if kind is None else dequantize_ref(b, torch.float32) for b in (ours, theirs))
        assert rms_ratio(ours.nan_to_num(0), theirs.nan_to_num(0)) < (1e-6 if kind is None else 0.5 / LARGEST[kind])


def test_what_does_not_fit_is_refused_with_its_shapes() -> None:
    with pytest.raises(ValueError, match=r"key \(2, 3, 8\).*cache of \(2, 4, 2, 8\)"):
        rotary_triton.rotary_store_triton(
            torch.zeros(2, 6, 8), torch.zeros(2, 3, 8), torch.zeros(2, 3, 8), (torch.zeros(2, 4), torch.zeros(2, 4)),
            (torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 2, 8)), torch.zeros(2, dtype=torch.int64),
        )  # fmt: skip
