"""Triton's norms and gate equal their definitions: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_kernels import TOLERANCE, rms_ratio
from vlserve.kernels.rms_norm import add_rms_norm_ref, rms_norm_ref
from vlserve.kernels.silu_mul import silu_mul_ref

pytest.importorskip("triton")
from tests.kernels.bfloat16 import compute_bfloat16
from vlserve.kernels import rms_norm_triton, silu_mul_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 63, 896))
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    apart = torch.randn(3, 2, 2 * width).to(dtype)
    x, residual, weight = apart[..., :width], torch.randn(3, 2, width).to(dtype), torch.randn(width).to(dtype)
    there = [t.to(DEVICE) for t in (apart, residual, weight)]
    want = rms_norm_ref(x.double(), weight.double(), 1e-6)
    got = rms_norm_triton.rms_norm_triton(there[0][..., :width], there[2], 1e-6)
    assert got.dtype == dtype and got.shape == x.shape and rms_ratio(got.cpu(), want) < TOLERANCE[dtype]
    got, total = rms_norm_triton.add_rms_norm_triton(there[0][..., :width], there[1], there[2], 1e-6)
    assert torch.equal(total.cpu(), add_rms_norm_ref(x, residual, weight, 1e-6)[1])
    assert rms_ratio(got.cpu(), rms_norm_ref(total.cpu().double(), weight.double(), 1e-6)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 129, 1100))
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # to infinity, as it should
def test_silu_mul(width: int, dtype: torch.dtype) -> None:
    x = 4 * torch.randn(3, 2, 2 * width).to(dtype)
    x[0, 0, 0] = -200
    got = silu_mul_triton.silu_mul_triton(x.to(DEVICE))
    assert got.dtype == dtype and got.shape == (3, 2, width)
    assert rms_ratio(got.cpu(), silu_mul_ref(x.double())) < TOLERANCE[dtype]
