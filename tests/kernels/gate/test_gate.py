"""The gate equals its formula: by torch, and by Triton's kernel, interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.errors import DTYPES, TOLERANCE, rms_ratio
from vlserve.kernels.gate import silu_mul
from vlserve.kernels.gate.reference import silu_mul_ref

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


def test_halves_of_different_width_are_refused() -> None:
    with pytest.raises(ValueError, match="last dimension is 5"):
        silu_mul(torch.zeros(2, 5))
