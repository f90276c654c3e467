"""Keys and values in eight bits: codes within half a step, nothing lost to outliers or zeros; stored as defined."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.caches import KINDS, awkward, poisoned, tensors
from tests.kernels.errors import DTYPES
from vlserve.kernels.kv_cache import store_kv
from vlserve.kernels.kv_cache.cpu import dequantize, quantize
from vlserve.kernels.kv_cache.reference import dequantize_ref, quantize_ref, store_kv_ref
from vlserve.kernels.kv_cache.types import LARGEST, QuantizedBlocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("dim", [1, 8, 80])
def test_codes_are_within_half_a_step(dim: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    x = awkward(2, dim, dtype)
    for operation in (quantize, quantize_ref):
        codes, scales = operation(x, kind)
        assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (kind, x.shape, torch.bfloat16, x.shape[:-1])
        got = dequantize_ref(QuantizedBlocks(codes, scales), torch.float64)
        largest = x.double().abs().amax(-1)
        torch.testing.assert_close(scales.double(), largest / LARGEST[kind], rtol=2**-8, atol=0)
        half_step = scales.double()[..., None] / 2 * torch.ones_like(got)
        if kind is torch.uint8:  # four significant bits, and a smallest step of 2^-9
            half_step = torch.maximum(x.double().abs() * 2**-4, half_step * 2**-9)
        assert ((got - x.double()).abs() <= half_step * (1 + 1e-6)).all()
        assert (got[3] == 0).all() and (scales[3] == 0).all() and not got.isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_broken_stays_broken(kind: torch.dtype) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(2, 1, 8)
        x[1, 0, 3] = value
        blocks = QuantizedBlocks(*quantize(x, kind))
        got = dequantize_ref(blocks, torch.float32)
        assert got[0].isfinite().all() and not got[1].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_every_code_is_read_as_torch_reads_it(dtype: torch.dtype, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[127] = codes[255] = 0  # NaN in E4M3: never written without a scale of NaN
    scales = torch.tensor([0, 2.0**-100, 0.3, 7.0], dtype=torch.bfloat16)
    blocks = QuantizedBlocks(
        codes.view(kind).expand(4, 3, 2, 256).contiguous(), scales[:, None, None].expand(4, 3, 2).contiguous()
    )
    picked = torch.tensor([3, 0, 1, 2, 3])
    want = dequantize_ref(blocks, torch.float64)[picked].to(dtype)
    assert torch.equal(dequantize(blocks, picked, dtype), want)
    monkeypatch.setattr("vlserve.kernels.kv_cache.cpu.AT_ONCE", 2 * 3 * 2 * 256)  # in three parts
    assert torch.equal(dequantize(blocks, picked, dtype), want)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_stored_as_defined_and_nothing_else_is_touched(kind: torch.dtype) -> None:
    for dtype in DTYPES:
        key, value = awkward(2, 4, dtype), awkward(2, 4, dtype)
        slots = torch.randperm(40)[: len(key)]
        caches = [poisoned((8, 5, 2, 4), dtype, kind) for _ in range(4)]
        store_kv(key, value, caches[0], caches[1], slots)
        store_kv_ref(key, value, caches[2], caches[3], slots)
        for got, want in ((caches[0], caches[2]), (caches[1], caches[3])):
            codes, scales = tensors(got)
            assert torch.equal(codes, tensors(want)[0]) and torch.equal(
                scales.view(torch.int16), tensors(want)[1].view(torch.int16)
            )
            assert int(scales.isnan().all(-1).sum()) == 40 - len(key)


def test_store_kv_equals_its_definition_and_touches_nothing_else() -> None:
    for dtype in DTYPES:
        key, value = torch.randn(9, 2, 4).to(dtype), torch.randn(9, 2, 4).to(dtype)
        slots = torch.randperm(40)[:9]
        caches = [torch.full((8, 5, 2, 4), 7.0, dtype=dtype) for _ in range(4)]
        store_kv(key, value, caches[0], caches[1], slots)
        store_kv_ref(key, value, caches[2], caches[3], slots)
        assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])
        assert int((caches[0] == 7.0).all(-1).all(-1).sum()) == 31


def test_what_does_not_fit_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit a cache"):
        store_kv(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), *[torch.zeros(2, 4, 2, 4)] * 2, torch.zeros(2, dtype=torch.int64))
