"""The gate equals its formula: by torch, and by Triton's kernel, interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.errors import DTYPES, TOLERANCE, rms_ratio
from vlserve.kernels.gate import clamped_swiglu, silu_mul
from vlserve.kernels.gate.reference import clamped_swiglu_ref, silu_mul_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 7, 63, 129))
def test_silu_mul_equals_its_formula(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2 * width).to(dtype)
    gate, up = x.double().chunk(2, -1)
    want = gate / (1 + (-gate).exp()) * up
    assert rms_ratio(silu_mul(x), want) < TOLERANCE[dtype]
    assert rms_ratio(silu_mul_ref(x), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("width", (1, 129, 1100, 2048))
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # to infinity, as it should
def test_the_kernel(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_triton = pytest.importorskip("vlserve.kernels.gate.triton")
    from tests.kernels.bfloat16 import compute_bfloat16

    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
    x = 4 * torch.randn(3, 2, 2 * width).to(dtype)
    x[0, 0, 0] = -200
    got = gate_triton.silu_mul_triton(x.to(DEVICE))
    assert got.dtype == dtype and got.shape == (3, 2, width)
    assert rms_ratio(got.cpu(), silu_mul_ref(x.double())) < TOLERANCE[dtype]


def clamped(x: torch.Tensor) -> torch.Tensor:
    """In float64, as GPT-OSS has it."""
    gate, up = x.double().chunk(2, -1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate / (1 + (-1.702 * gate).exp())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("width", (1, 129, 1100, 2880))
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # to infinity, as it should
def test_clamped_swiglu(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some numbers are beyond the limits, on either side."""
    x = 6 * torch.randn(3, 2 * width).to(dtype)
    x[0, 0], x[1, -1] = -200, -30
    want = clamped(x)
    for operation in (clamped_swiglu, clamped_swiglu_ref):
        assert rms_ratio(operation(x, 1.702, 7.0), want) < TOLERANCE[dtype]
    gate_triton = pytest.importorskip("vlserve.kernels.gate.triton")
    from tests.kernels.bfloat16 import compute_bfloat16

    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
    got = gate_triton.clamped_swiglu_triton(x.to(DEVICE), 1.702, 7.0)
    assert got.dtype == dtype and got.shape == (3, width)
    assert rms_ratio(got.cpu(), want) < TOLERANCE[dtype]


def test_halves_of_different_width_are_refused() -> None:
    for gate in (silu_mul, lambda x: clamped_swiglu(x, 1.702, 7.0)):
        with pytest.raises(ValueError, match="last dimension is 5"):
            gate(torch.zeros(2, 5))
