"""The 16-bit head's product equals its definition: by torch, and by Triton's kernel, interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.errors import TOLERANCE, rms_ratio
from vlserve.kernels.head import head_matmul
from vlserve.kernels.head.reference import head_matmul_ref

pytest.importorskip("triton")
from tests.kernels.bfloat16 import compute_bfloat16
from vlserve.kernels import head
from vlserve.kernels.head import triton as head_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves out is NaN."""
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
    monkeypatch.setattr(torch, "empty", lambda *size, **settings: torch.full(size, float("nan"), **settings))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs,inputs", [(1, 5), (65, 129), (200, 64)])
@pytest.mark.parametrize("rows", (1, 7, 16))
def test_the_head(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    want = head_matmul_ref(x.double(), weight.double())
    for got in (head_triton.head_matmul_triton(x.to(DEVICE), weight.to(DEVICE)).cpu(), head_matmul(x, weight)):
        assert got.dtype == dtype and got.shape == want.shape and rms_ratio(got, want) < TOLERANCE[dtype]


def test_more_rows_and_float32_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(head, "runs_triton", lambda x: True)
    monkeypatch.setattr(head_triton, "head_matmul_triton", lambda x, weight: launched.append(len(x)))
    weight = torch.randn(3, 8)
    for rows in (16, 17):
        head_matmul(torch.randn(rows, 8), weight)
        head_matmul(torch.randn(rows, 8).half(), weight.half())
    assert launched == [16]


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"\(2, 31\) and \(8, 32\); expected \[T, K\] and \[N, K\]"):
        head_matmul(torch.zeros(2, 31), torch.zeros(8, 32))
    with pytest.raises(ValueError, match="x is torch.float16 but weight is torch.float32"):
        head_matmul(torch.zeros(2, 32).half(), torch.zeros(8, 32))
