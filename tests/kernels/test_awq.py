"""4-bit and 8-bit products equal their definitions in float64: on the CPU, and as Triton computes them, in its interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlserve.kernels.head import int8_matmul
from vlserve.kernels.head.cpu import int8_matmul_torch
from vlserve.kernels.head.reference import int8_matmul_ref, quantise_rows
from vlserve.kernels.int4 import awq_dequantize, awq_matmul
from vlserve.kernels.int4 import cpu as int4_cpu
from vlserve.kernels.int4.cpu import GROUPS, OperatorInt4, PackedInt4, PlainInt4, awq_matmul_cpu, operator_half, pack_for_cpu
from vlserve.kernels.int4.reference import awq_dequantize_ref, awq_matmul_ref

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
# outputs, inputs, inputs of a group
SIZES = [
    *((n, 32, g) for n in (8, 24, 100) for g in (16, 32)),
    *((n, 96, g) for n in (8, 24, 100) for g in (16, 32, 96)),
    *((8, 4128, g) for g in (16, 32, 4128)),
    *((24, 256, g) for g in (64, 128, 256)),
    (100, 1024, 512),
    (1, 20, 20),
]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def weights(outputs: int, inputs: int, group: int, dtype: torch.dtype) -> Weights:
    """codes, scales and zeros; of several groups the first output's last one has scale 0, as padding has."""
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    scales = (torch.rand(outputs, inputs // group) / 10 + 0.01).to(dtype)
    scales[0, 1:][-1:] = 0
    return codes, scales, torch.randint(0, 17, scales.shape, dtype=torch.uint8)


def spread_out(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The weights in float64, one after another."""
    group = 2 * codes.shape[1] // scales.shape[1]
    return torch.tensor(
        [
            [((row[k // 2] >> 4 * (k % 2) & 15) - zero[k // group]) * scale[k // group] for k in range(2 * len(row))]
            for row, scale, zero in zip(codes.tolist(), scales.tolist(), zeros.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


def rms_ratio(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the error over that of the value."""
    return float((got.double() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-12))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written to is full of NaN, or of the largest whole number."""
    empty = torch.empty

    def fill(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", fill)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_definition_is_that_of_each_weight(size: tuple[int, int, int]) -> None:
    codes, scales, zeros = weights(*size, torch.float32)
    want = spread_out(codes, scales, zeros)
    assert torch.equal(awq_dequantize_ref(codes, scales.double(), zeros), want)
    assert torch.equal(awq_dequantize(codes, scales, zeros), want.float()), "rounded once"
    x = torch.randn(3, size[1])
    assert torch.allclose(awq_matmul_ref(x.double(), codes, scales, zeros), x.double() @ want.T, rtol=1e-12)
    assert rms_ratio(awq_matmul(x, codes, scales, zeros), x.double() @ want.T) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("operator_rows", (6, 0), ids=("operator", "spread out"))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_cpu_form(
    size: tuple[int, int, int], operator_rows: int, dtype: torch.dtype, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_cpu, "OPERATOR_ROWS", operator_rows)
    monkeypatch.setattr(int4_cpu, "BLOCK", 5000)  # several blocks, the last one smaller
    given = weights(*size, dtype)
    packed = pack_for_cpu(*given)
    assert isinstance(packed, PlainInt4) == (dtype == torch.float32)
    for rows in (1, 3, 6, 17):
        x = torch.randn(rows, size[1]).to(dtype)
        got, want = awq_matmul_cpu(x, packed), awq_matmul_ref(x.double(), *given)
        assert got.shape == want.shape and got.dtype == dtype
        # float16 is computed in bfloat16
        assert rms_ratio(got, want) < TOLERANCE[torch.bfloat16 if dtype == torch.float16 else dtype]


def test_the_operators_order_is_known_here() -> None:
    assert operator_half() in (16, 32)


def test_where_the_order_is_unknown_the_codes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    given = weights(24, 96, 32, torch.bfloat16)
    monkeypatch.setattr(int4_cpu, "operator_half", lambda: None)
    x = torch.randn(3, 96).bfloat16()
    packed = pack_for_cpu(*given)
    assert isinstance(packed, PlainInt4)
    assert rms_ratio(awq_matmul_cpu(x, packed), awq_matmul_ref(x.double(), *given)) < TOLERANCE[torch.bfloat16]


def operator(packed: PackedInt4) -> OperatorInt4:
    assert isinstance(packed, OperatorInt4)
    return packed


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shift", (16, 48, 112))
def test_groups_that_a_rank_has_cut_are_found_again(group: int, shift: int) -> None:
    """A rank's inputs begin and end within groups: kept in groups of 16 the same scale comes many times."""
    coarse = weights(8, 4 * group, group, torch.bfloat16)
    shift %= group
    codes = coarse[0][:, shift // 2 : -8].contiguous()
    scales, zeros = (t.repeat_interleave(group // 16, 1)[:, shift // 16 : -1].contiguous() for t in coarse[1:])
    packed = operator(pack_for_cpu(codes, scales, zeros))
    assert (packed.padding.group, packed.padding.before) == (group, shift) and not packed.padding.spread
    x = torch.randn(4, 2 * codes.shape[1]).bfloat16()
    assert rms_ratio(awq_matmul_cpu(x, packed), awq_matmul_ref(x.double(), codes, scales, zeros)) < TOLERANCE[torch.bfloat16]


def test_packed_weights_take_four_bits_and_their_scales() -> None:
    packed = operator(pack_for_cpu(*weights(128, 1024, 128, torch.bfloat16)))
    assert packed.nbytes == 128 * 1024 // 2 + 128 * 8 * (2 + 2 + 2 + 1)


def test_the_operator_is_no_less_exact_than_dense_weights() -> None:
    """Also where all inputs are positive, so that rounding errors of the zero points would add up."""
    codes, scales, zeros = weights(64, 1024, 128, torch.bfloat16)
    x = torch.rand(4, 1024).bfloat16()
    want = awq_matmul_ref(x.double(), codes, scales, zeros)
    dense = torch.nn.functional.linear(x, awq_dequantize_ref(codes, scales, zeros))
    ratio = rms_ratio(awq_matmul_cpu(x, pack_for_cpu(codes, scales, zeros)), want) / rms_ratio(dense, want)
    assert ratio < 2, ratio


INTERPRETED = [torch.float32, torch.float16]  # the interpreter computes bfloat16 on raw bits


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_triton_form(size: tuple[int, int, int], dtype: torch.dtype, poisoned: None) -> None:
    from vlserve.kernels.int4.triton import awq_dequantize_triton, awq_matmul_triton

    given = weights(*size, dtype)
    assert torch.equal(awq_dequantize_triton(*given), awq_dequantize_ref(*given))
    for rows, splits in ((1, 1), (3, 3), (17, 2)):
        x = torch.randn(rows, size[1]).to(dtype)
        got = awq_matmul_triton(x, *given, splits=splits)
        assert got.shape == (rows, size[0]) and got.dtype == dtype
        assert rms_ratio(got, awq_matmul_ref(x.double(), *given)) < TOLERANCE[dtype]


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    codes, scales, zeros = weights(8, 96, 32, torch.float32)
    with pytest.raises(ValueError, match=r"x is \(2, 95\), expected \[T, 96\]"):
        awq_matmul(torch.zeros(2, 95), codes, scales, zeros)
    with pytest.raises(ValueError, match=r"x is \(2, 95\), expected \[T, 96\]"):
        awq_matmul_cpu(torch.zeros(2, 95), pack_for_cpu(codes, scales, zeros))
    with pytest.raises(ValueError, match="96 inputs in 4 groups"):
        awq_dequantize(codes, scales.repeat(1, 2)[:, :4], zeros.repeat(1, 2)[:, :4])
    with pytest.raises(ValueError, match=r"\(8, 48\), \(8, 3\), \(8, 2\)"):
        awq_dequantize(codes, scales, zeros[:, :2])
    with pytest.raises(ValueError, match="torch.int8"):
        awq_dequantize(codes.view(torch.int8), scales, zeros)
    with pytest.raises(ValueError, match=r"\(2, 31\), \(8, 32\), \(8,\)"):
        int8_matmul(torch.zeros(2, 31), torch.zeros(8, 32, dtype=torch.int8), torch.zeros(8))
    with pytest.raises(ValueError, match="torch.uint8 and torch.float32"):
        int8_matmul(torch.zeros(2, 32), torch.zeros(8, 32, dtype=torch.uint8), torch.zeros(8))


def interpreted(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    from vlserve.kernels.head.triton import int8_matmul_triton

    return int8_matmul_triton(x, codes, scales)


HEADS = [(int8_matmul_torch, dtype) for dtype in TOLERANCE] + [(interpreted, dtype) for dtype in INTERPRETED]


@pytest.mark.parametrize("form,dtype", HEADS, ids=lambda v: getattr(v, "__name__", str(v)))
@pytest.mark.parametrize("outputs,inputs", [(1, 5), (8, 32), (24, 96), (100, 20), (9, 4128)])
def test_the_head(form: Callable[..., torch.Tensor], dtype: torch.dtype, outputs: int, inputs: int, poisoned: None) -> None:
    codes, scales = quantise_rows(torch.randn(outputs, inputs).to(dtype))
    for rows in (1, 3, 17):
        x = 100 * torch.randn(rows, inputs).to(dtype)
        got, want = form(x, codes, scales), int8_matmul_ref(x.double(), codes, scales)
        assert got.shape == want.shape and got.dtype == dtype
        on_cpu = dtype == torch.float16 and form is int8_matmul_torch  # computed in bfloat16
        assert rms_ratio(got, want) < TOLERANCE[torch.bfloat16 if on_cpu else dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_are_quantised_to_half_a_step(dtype: torch.dtype) -> None:
    weight = (torch.randn(700, 900) * torch.logspace(-6, 2, 700)[:, None]).to(dtype)  # more than one block
    weight[3] = 0
    codes, scales = quantise_rows(weight)
    assert scales.dtype == torch.float32 and torch.equal(scales, scales.bfloat16().float())
    assert int(codes.abs().max()) == 127 and not codes[3].any() and scales[3] == 0
    assert ((codes * scales[:, None] - weight.float()).abs() <= 0.5001 * scales[:, None]).all()
