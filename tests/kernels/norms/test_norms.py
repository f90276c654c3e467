"""Root-mean-square norms equal their formula; what does not fit is refused. Layer norms: test_triton.py."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.errors import DTYPES, TOLERANCE, rms_ratio
from vlserve.kernels.norms import add_rms_norm, rms_norm
from vlserve.kernels.norms.reference import add_rms_norm_ref, rms_norm_ref


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", (1, 7, 63, 129))
def test_rms_norm_equals_its_formula(width: int, dtype: torch.dtype) -> None:
    x, residual, weight = torch.randn(5, width).to(dtype), torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    d = x.double()
    want = weight.double() * d / (d.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert rms_ratio(rms_norm(x, weight, 1e-6), want) < TOLERANCE[dtype]
    assert rms_ratio(rms_norm_ref(x, weight, 1e-6), want) < TOLERANCE[dtype]
    got, want_pair = add_rms_norm(x, residual, weight, 1e-6), add_rms_norm_ref(x, residual, weight, 1e-6)
    assert torch.equal(got[1], x + residual) and rms_ratio(got[0], want_pair[0]) < TOLERANCE[dtype]


def test_a_weight_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="weight is \\(4,\\).*5 channels"):
        rms_norm(torch.zeros(2, 5), torch.zeros(4), 1e-6)
