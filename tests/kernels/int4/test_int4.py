"""4-bit products equal their definitions in float64: on the CPU, and as Triton computes them, in its interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.int4.weights import INTERPRETED, TOLERANCE, poisoned, rms_ratio, weights
from vlserve.kernels.int4 import awq_dequantize, awq_matmul
from vlserve.kernels.int4 import cpu as int4_cpu
from vlserve.kernels.int4.cpu import GROUPS, OperatorInt4, PackedInt4, PlainInt4, awq_matmul_cpu, operator_half, pack_for_cpu
from vlserve.kernels.int4.reference import awq_dequantize_ref, awq_matmul_ref

__all__ = ["poisoned"]

# outputs, inputs, inputs of a group
SIZES = [
    *((n, 32, g) for n in (8, 24, 100) for g in (16, 32)),
    *((n, 96, g) for n in (8, 24, 100) for g in (16, 32, 96)),
    *((8, 4128, g) for g in (16, 32, 4128)),
    *((24, 256, g) for g in (64, 128, 256)),
    (100, 1024, 512),
    (1, 20, 20),
]


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
def test_on_a_cpu(
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


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_kernels(size: tuple[int, int, int], dtype: torch.dtype, poisoned: None) -> None:
    from vlserve.kernels.int4.triton import awq_dequantize_triton, awq_matmul_triton

    given = weights(*size, dtype)
    assert torch.equal(awq_dequantize_triton(*given), awq_dequantize_ref(*given))
    for rows, splits in ((1, 1), (3, 3), (17, 2)):
        x = torch.randn(rows, size[1]).to(dtype)
        got = awq_matmul_triton(x, *given, splits=splits)
        assert got.shape == (rows, size[0]) and got.dtype == dtype
        assert rms_ratio(got, awq_matmul_ref(x.double(), *given)) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows,splits", [(17, 1), (70, 1), (70, 2)])
def test_many_rows_with_groups_within_a_block(rows: int, splits: int, poisoned: None) -> None:
    from vlserve.kernels.int4.triton import awq_matmul_triton

    given = weights(8, 96, 16, torch.float16)
    x = torch.randn(rows, 96).half()
    got = awq_matmul_triton(x, *given, splits=splits)
    assert rms_ratio(got, awq_matmul_ref(x.double(), *given)) < TOLERANCE[torch.float16]


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
