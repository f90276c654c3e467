"""The head in 8 bits equals its definition in float64: by torch's operators, and as Triton computes it, in its interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.kernels.int4.weights import INTERPRETED, TOLERANCE, poisoned, rms_ratio
from vlserve.kernels.head import int8_matmul
from vlserve.kernels.head.cpu import int8_matmul_torch
from vlserve.kernels.head.reference import int8_matmul_ref, quantise_rows

__all__ = ["poisoned"]


def interpreted(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from vlserve.kernels.head.triton import int8_matmul_triton

    return int8_matmul_triton(x, codes, scales)


HEADS = [(int8_matmul_torch, dtype) for dtype in TOLERANCE] + [(interpreted, dtype) for dtype in INTERPRETED]


@pytest.mark.parametrize("implementation,dtype", HEADS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("outputs,inputs", [(1, 5), (8, 32), (24, 96), (100, 20), (9, 4128)])
def test_the_head(
    implementation: Callable[..., torch.Tensor], dtype: torch.dtype, outputs: int, inputs: int, poisoned: None
) -> None:
    codes, scales = quantise_rows(torch.randn(outputs, inputs).to(dtype))
    for rows in (1, 3, 17):
        x = 100 * torch.randn(rows, inputs).to(dtype)
        got, want = implementation(x, codes, scales), int8_matmul_ref(x.double(), codes, scales)
        assert got.shape == want.shape and got.dtype == dtype
        on_cpu = dtype == torch.float16 and implementation is int8_matmul_torch  # computed in bfloat16
        assert rms_ratio(got, want) < TOLERANCE[torch.bfloat16 if on_cpu else dtype]


@pytest.mark.parametrize("rows", (2, 20, 64))
def test_the_kernel_in_bfloat16(rows: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tests.kernels.bfloat16 import compute_bfloat16

    compute_bfloat16(monkeypatch)
    codes, scales = quantise_rows(torch.randn(70, 160))
    x = torch.randn(rows, 160).bfloat16()
    want = int8_matmul_ref(x.double(), codes, scales)
    assert rms_ratio(interpreted(x, codes, scales), want) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_are_quantised_to_half_a_step(dtype: torch.dtype) -> None:
    weight = (torch.randn(700, 900) * torch.logspace(-6, 2, 700)[:, None]).to(dtype)  # more than one block
    weight[3] = 0
    codes, scales = quantise_rows(weight)
    assert scales.dtype == torch.float32 and torch.equal(scales, scales.bfloat16().float())
    assert int(codes.abs().max()) == 127 and not codes[3].any() and scales[3] == 0
    assert ((codes * scales[:, None] - weight.float()).abs() <= 0.5001 * scales[:, None]).all()


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"\(2, 31\), \(8, 32\), \(8,\)"):
        int8_matmul(torch.zeros(2, 31), torch.zeros(8, 32, dtype=torch.int8), torch.zeros(8))
    with pytest.raises(ValueError, match="torch.uint8 and torch.float32"):
        int8_matmul(torch.zeros(2, 32), torch.zeros(8, 32, dtype=torch.uint8), torch.zeros(8))
