"""Products with chosen experts equal their definition in float64, by torch's operators; chosen experts alone are read."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from tests.kernels.errors import rms_ratio
from tests.kernels.experts.weights import TOLERANCE, dense, fp8, int4, mxfp4, stored
from vlserve.kernels.experts import ExpertWeights, Fp8Experts, combine, experts_matmul, prepare, routes
from vlserve.kernels.experts.reference import E2M1, combine_ref, dequantize_ref, experts_matmul_ref

CHOSEN = torch.tensor([[4, 2], [3, 9], [2, 4], [0, 1]])  # this rank has 2, 3 and 4
OURS = {"num_experts": 3, "first": 2}


def test_the_definition_is_that_of_each_code() -> None:
    of_blocks, four = fp8(1, 2, 20, 16, 5), mxfp4(1, 2, 64)
    for n in range(2):
        for k in range(20):
            scale = of_blocks.scales[0, n, (k + 5) // 16].double()
            assert dequantize_ref(of_blocks)[0, n, k] == of_blocks.codes[0, n, k].double() * scale
        for k in range(64):
            code = int(four.codes[0, n, k // 32, k % 32 // 2]) >> 4 * (k % 2) & 15
            assert dequantize_ref(four)[0, n, k] == E2M1[code] * 2.0 ** (int(four.scales[0, n, k // 32]) - 127)


def test_what_another_rank_has_is_zeros() -> None:
    x, weights = torch.randn(4, 40), dense(3, 20, 40, torch.float32)
    got = experts_matmul(x, weights, routes(CHOSEN, **OURS), torch.ones(3, 20)).view(4, 2, 20)
    for token in range(4):
        for number in range(2):
            expert = int(CHOSEN[token, number]) - 2
            want = x[token] @ weights.weight[expert].T + 1 if 0 <= expert < 3 else torch.zeros(20)
            torch.testing.assert_close(got[token, number], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", stored(torch.float32))
def test_it_equals_its_definition(name: str, dtype: torch.dtype) -> None:
    """With a row of x a token, and one a choice; as stored, and as put in order for this processor."""
    weights = stored(dtype)[name]
    experts, outputs, inputs = weights.size
    bias = torch.randn(experts, outputs).to(dtype)
    ours = routes(CHOSEN, **OURS)
    # float16 in 4 bits is computed in bfloat16
    tolerance = TOLERANCE[torch.bfloat16 if name.startswith("int4") and dtype == torch.float16 else dtype]
    for rows, given in ((4, None), (8, bias)):
        x = torch.randn(rows, inputs).to(dtype)
        want = experts_matmul_ref(x.double(), weights, ours, given)
        for one in (weights, prepare(weights)):
            got = experts_matmul(x, one, ours, given)
            assert got.dtype == dtype and rms_ratio(got, want) < tolerance
            assert not got[torch.tensor([3, 6, 7])].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_powers_of_two_are_exact(dtype: torch.dtype) -> None:
    weights = mxfp4(1, 8, 64, lowest=1, highest=250)
    got = experts_matmul(torch.eye(64).to(dtype), weights, routes(torch.zeros(64, 1).int(), 1))
    assert torch.equal(got.double(), dequantize_ref(weights)[0].T)


@pytest.mark.parametrize("name", stored(torch.float32))
def test_weights_of_others_are_not_read(name: str) -> None:
    """NaN, or codes that would be seen, where nobody may look."""
    weights = stored(torch.float32)[name]
    x = torch.randn(2, weights.size[2])
    chosen = routes(torch.tensor([[2], [2]]), 3)
    want = experts_matmul(x, weights, chosen)
    for one in (spoilt(weights), prepare(spoilt(weights))):
        assert torch.equal(experts_matmul(x, one, chosen), want)
    assert not experts_matmul(x, spoilt(weights), routes(torch.tensor([[7], [9]]), 3)).any()


def spoilt(weights: ExpertWeights) -> ExpertWeights:
    """Without the experts 0 and 1."""
    changed = {}
    for field in fields(weights):
        if isinstance(tensor := getattr(weights, field.name), torch.Tensor):
            of_others = torch.full_like(tensor[:2], float("nan") if tensor.is_floating_point() else 255)
            changed[field.name] = torch.cat((of_others, tensor[2:]))
    return replace(weights, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_sum_is_in_the_order_of_choices(dtype: torch.dtype) -> None:
    out, weights = torch.randn(12, 7).to(dtype), torch.rand(4, 3)
    got = combine(out, weights)
    assert got.dtype == dtype and rms_ratio(got, combine_ref(out.double(), weights)) < TOLERANCE[dtype]
    want = torch.zeros(4, 7)
    for number in range(3):
        want += out.view(4, 3, 7)[:, number].float() * weights[:, number, None]
    assert torch.equal(got, want.to(dtype))
    assert torch.equal(combine(out[3:6].contiguous(), weights[1:2]), got[1:2]), "alone as beside others"


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    ours, weights = routes(CHOSEN, **OURS), dense(3, 20, 40, torch.float32)
    with pytest.raises(ValueError, match=r"x is \(3, 40\); expected \[4, K\] or \[8, K\]"):
        experts_matmul(torch.zeros(3, 40), weights, ours)
    with pytest.raises(ValueError, match=r"x is \(4, 41\), expected \[T, 40\]"):
        experts_matmul(torch.zeros(4, 41), weights, ours)
    with pytest.raises(ValueError, match="routes are for 2 experts, the weights of 3"):
        experts_matmul(torch.zeros(4, 40), weights, routes(CHOSEN, 2))
    with pytest.raises(ValueError, match=r"bias is \(20,\), expected \[3, 20\]"):
        experts_matmul(torch.zeros(4, 40), weights, ours, torch.zeros(20))
    with pytest.raises(ValueError, match=r"experts are \(4,\)"):
        routes(CHOSEN[:, 0], 3)
    with pytest.raises(ValueError, match=r"expected \[T \* S, C\]"):
        combine(torch.zeros(7, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"Mxfp4Experts of \(3, 20, 3, 16\) torch.uint8"):
        prepare(replace(mxfp4(3, 20, 96), scales=torch.zeros(3, 20, 2, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="Int4Experts"):
        prepare(int4(3, 8, 96, 24, torch.float32))
    short = fp8(3, 8, 192, 128, 64)
    with pytest.raises(ValueError, match="Fp8Experts"):
        prepare(Fp8Experts(codes=short.codes, scales=short.scales[..., :1], block=128, offset=64))
