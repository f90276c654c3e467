"""Triton's norms equal their definitions: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.errors import TOLERANCE, rms_ratio
from vlserve.kernels.norms import add_scaled_norm, layer_norm
from vlserve.kernels.norms.reference import add_rms_norm_ref, add_scaled_norm_ref, layer_norm_ref, rms_norm_ref

pytest.importorskip("triton")
from tests.kernels.bfloat16 import compute_bfloat16
from vlserve.kernels.norms import triton as norms_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves out is NaN."""
    monkeypatch.setattr(torch, "empty", lambda shape, **settings: torch.full(shape, float("nan"), **settings))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 63, 896))
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    apart = torch.randn(3, 2, 2 * width).to(dtype)
    x, residual, weight = apart[..., :width], torch.randn(3, 2, width).to(dtype), torch.randn(width).to(dtype)
    there = [t.to(DEVICE) for t in (apart, residual, weight)]
    want = rms_norm_ref(x.double(), weight.double(), 1e-6)
    got = norms_triton.rms_norm_triton(there[0][..., :width], there[2], 1e-6)
    assert got.dtype == dtype and got.shape == x.shape and rms_ratio(got.cpu(), want) < TOLERANCE[dtype]
    got, total = norms_triton.add_rms_norm_triton(there[0][..., :width], there[1], there[2], 1e-6)
    assert torch.equal(total.cpu(), add_rms_norm_ref(x, residual, weight, 1e-6)[1])
    assert rms_ratio(got.cpu(), rms_norm_ref(total.cpu().double(), weight.double(), 1e-6)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 63, 1024))
def test_layer_norm(width: int, dtype: torch.dtype, poisoned: None) -> None:
    x, weight, bias = 3 + torch.randn(3, 5, width).to(dtype), torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    d = x.double()
    centred = d - d.mean(-1, keepdim=True)
    want = weight.double() * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() + bias.double()
    got = norms_triton.layer_norm_triton(x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), 1e-6).cpu()
    for implementation in (got, layer_norm(x, weight, bias, 1e-6), layer_norm_ref(x, weight, bias, 1e-6)):
        assert (
            implementation.dtype == dtype
            and implementation.shape == x.shape
            and rms_ratio(implementation, want) < TOLERANCE[dtype]
        )


@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 63, 1024))
def test_add_scaled_norm(width: int, dtype: torch.dtype, has_bias: bool, poisoned: None) -> None:
    branch, residual = (3 + torch.randn(3, 5, width).to(dtype) for _ in range(2))
    scale, weight, some = (torch.randn(width).to(dtype) for _ in range(3))
    bias = some if has_bias else None
    given = [None if t is None else t.to(DEVICE) for t in (branch, residual, scale, weight, bias)]
    got = norms_triton.add_scaled_norm_triton(*given, 1e-6)  # type: ignore[arg-type]
    sums = residual.double() + scale.double() * branch.double()
    for norm, total in (
        (got[0].cpu(), got[1].cpu()),
        add_scaled_norm(branch, residual, scale, weight, bias, 1e-6),
        add_scaled_norm_ref(branch, residual, scale, weight, bias, 1e-6),
    ):
        assert norm.dtype == total.dtype == dtype and rms_ratio(total, sums) < TOLERANCE[dtype]
        d = total.double()
        want = rms_norm_ref(d, weight.double(), 1e-6) if bias is None else layer_norm_ref(d, weight, bias, 1e-6)
        assert norm.shape == branch.shape and rms_ratio(norm, want) < TOLERANCE[dtype]


def test_what_does_not_fit_a_norm_is_refused_with_its_numbers() -> None:
    x, c = torch.zeros(2, 5), torch.zeros(5)
    with pytest.raises(ValueError, match=r"bias is \(4,\), expected one value for each of the 5 channels"):
        layer_norm(x, c, torch.zeros(4), 1e-6)
    with pytest.raises(ValueError, match=r"branch is \(2, 5\) but residual is \(5,\); expected equal shapes"):
        add_scaled_norm(x, c, c, c, None, 1e-6)
    with pytest.raises(ValueError, match=r"scale is \(1,\)"):
        add_scaled_norm(x, x, torch.zeros(1), c, c, 1e-6)
