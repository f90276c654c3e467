"""Products with codes in pairs equal the definition in float64: in Triton's interpreter, or compiled where there is a GPU.

In the interpreter bfloat16 is multiplied as float32, from the same bits; only the last rounding, which it gets wrong, differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.int4.weights import TOLERANCE, poisoned, rms_ratio, weights
from vlserve.kernels import group_sums, int4_pairs
from vlserve.kernels.group_sums.reference import empty_sums
from vlserve.kernels.int4.reference import awq_dequantize_ref, awq_matmul_ref
from vlserve.kernels.int4_pairs import PairedWeights, pack_for_gpu
from vlserve.kernels.int4_pairs.launch import Launch, fitted, launches
from vlserve.kernels.int4_pairs.reference import unpack_pairs
from vlserve.llm import formats_int4
from vlserve.llm.formats_int4 import GroupedInt4Format, Int4Storage
from vlserve.llm.int4_packing import AWQ_GEMM
from vlserve.llm.quantisation import INT4, Quantisation
from vlserve.llm.tensor_parallel import Span

pytest.importorskip("triton")
pairs_triton: Any = pytest.importorskip("vlserve.kernels.int4_pairs.triton")
sums_triton: Any = pytest.importorskip("vlserve.kernels.group_sums.triton")
__all__ = ["poisoned"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
NARROW, WIDE, MANY = (
    Launch(block_t=rows, block_n=outputs, warps=2, stages=3, waves=4) for rows, outputs in ((16, 64), (16, 128), (64, 128))
)
# outputs, inputs, inputs of a group; with padding of either size, and one group
SIZES = [
    (64, 128, 128),
    (8, 896, 128),
    (70, 896, 128),
    (100, 160, 32),
    (130, 192, 64),
    (3, 20, 20),
    (5, 512, 256),
    (16, 384, 384),
]


def packed(outputs: int, inputs: int, group: int, dtype: torch.dtype) -> tuple[PairedWeights, tuple[torch.Tensor, ...]]:
    given = tuple(tensor.to(DEVICE) for tensor in weights(outputs, inputs, group, dtype))
    return pack_for_gpu(*given), given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_order_is_the_one_described(size: tuple[int, int, int], dtype: torch.dtype, poisoned: None) -> None:
    ours, (codes, scales, zeros) = packed(*size, dtype)
    back = unpack_pairs(ours)
    assert all(torch.equal(got, want) for got, want in zip(back, (codes, scales, zeros), strict=True))
    for n, k in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 2 + 3)):
        b, i, q, c, h = k // 128, k // 32 % 4, k // 8 % 4, k // 2 % 4, k % 2
        word = int(ours.words[n // 64, b, n % 64, 4 * c + q])
        assert word >> (4 * i + 16 * h) & 15 == int(codes[n, k // 2]) >> 4 * h & 15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size,rows,launch,parts",
    [
        ((64, 128, 128), 1, NARROW, 1),
        ((70, 896, 128), 3, WIDE, 2),  # 7 groups in 4 and 3
        ((8, 7392, 32), 2, NARROW, 5),  # 231 groups
        ((100, 160, 32), 17, NARROW, 1),
        ((130, 192, 64), 16, WIDE, 2),
        ((3, 20, 20), 2, NARROW, 1),
        ((5, 512, 256), 33, MANY, 3),  # parts begin within groups
        ((16, 384, 384), 1, NARROW, 2),
        ((8, 128, 128), 128, MANY, 1),
        ((200, 256, 128), 70, MANY, 2),
    ],
    ids=str,
)
def test_the_product(
    size: tuple[int, int, int], rows: int, launch: Launch, parts: int, dtype: torch.dtype, poisoned: None
) -> None:
    ours, given = packed(*size, dtype)
    x = torch.randn(rows, size[1]).to(DEVICE, dtype)
    padded = F.pad(x, (0, ours.padded_inputs - ours.inputs))
    out = torch.empty(parts, rows, size[0], device=DEVICE)  # in float32, so that nothing but the sums is rounded
    pairs_triton.multiply_parts(padded, ours, sums_triton.group_sums_triton(padded, ours.empty_sums(padded)), launch, out)
    # what a magic number adds is taken off again: of float16's 1024 more is lost than of bfloat16's 128
    tolerance = 1e-4 if dtype == torch.float16 else 2e-5
    assert rms_ratio(out.sum(0), awq_matmul_ref(x.double(), *given)) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts,group", [(1, 128), (2, 128), (1, 32)])
def test_the_product_of_every_launch_in_the_table(parts: int, group: int, dtype: torch.dtype, poisoned: None) -> None:
    """Rounded to x's type, which the interpreter cuts off."""
    ours, given = packed(130, 256, group, dtype)
    x = torch.randn(20, 256).to(DEVICE, dtype)
    sums, want = sums_triton.group_sums_triton(x, ours.empty_sums(x)), awq_matmul_ref(x.double(), *given)
    kinds = {fitted(launch, dtype) for table in launches().values() for launch in table.values()}
    for launch in {(launch.block_t, launch.block_n): launch for launch in kinds}.values():
        assert rms_ratio(pairs_triton.multiply(x, ours, sums, launch, parts), want) < 2 * TOLERANCE[dtype], launch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weights_are_spread_out_as_defined(size: tuple[int, int, int], dtype: torch.dtype, poisoned: None) -> None:
    ours, given = packed(*size, dtype)
    got, want = pairs_triton.pairs_dequantize_triton(ours)[:, : size[1]], awq_dequantize_ref(*given)
    if dtype == torch.float16:
        assert torch.equal(got, want)
    else:  # which the interpreter cuts off
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Tensors on the CPU are treated as a small GPU's."""
    for module in (int4_pairs, formats_int4, group_sums):
        monkeypatch.setattr(module, "runs_triton", lambda x: True)
    monkeypatch.setattr(pairs_triton, "device_of", lambda index: ("sm_90", 2))


def layer(outputs: int, inputs: int, group: int, dtype: torch.dtype) -> tuple[GroupedInt4Format, tuple[torch.Tensor, ...]]:
    """Loaded, and what was loaded."""
    given = weights(outputs, inputs, group, dtype)
    form = Int4Storage(layout=AWQ_GEMM, group=group)
    made = GroupedInt4Format(Span(0, inputs, inputs), inputs, {"q_proj": (Span(0, outputs, outputs), outputs)}, form, dtype)
    for name, tensor in zip(("codes", "scales", "zeros"), given, strict=True):
        getattr(made, name).data.copy_(tensor)
    made.to(DEVICE).finish()
    return made, tuple(tensor.to(DEVICE) for tensor in given)


@pytest.mark.parametrize("rows", (1, 17, 129))
def test_a_layer_has_pairs_alone(rows: int, on_a_gpu: None) -> None:
    made, given = layer(64, 896, 128, torch.float16)
    assert isinstance(made.packed, PairedWeights)
    assert sum(parameter.numel() for parameter in made.parameters()) == 0, "the codes are freed"
    x = torch.randn(rows, 896).to(DEVICE, torch.float16)
    got = made(x)
    assert got.dtype == x.dtype and rms_ratio(got, awq_matmul_ref(x.double(), *given)) < TOLERANCE[torch.float16]


def test_a_layer_takes_what_the_plan_counts(on_a_gpu: None) -> None:
    made, _ = layer(128, 896, 128, torch.bfloat16)
    assert made.packed_bytes == Quantisation(where="", method="", kind=INT4, group_size=128).linear_bytes(128, 896, 2)


@pytest.mark.parametrize("dtype,group", [(torch.float32, 128), (torch.float16, 16)])
def test_what_pairs_do_not_take_keeps_its_codes(dtype: torch.dtype, group: int, on_a_gpu: None) -> None:
    made, given = layer(64, 384, group, dtype)
    assert made.packed is None and made.codes.shape == (64, 192)
    with pytest.raises(ValueError, match=f"384 inputs in {384 // group} groups"):
        pack_for_gpu(*given)


def test_sums_of_other_groups_are_refused(on_a_gpu: None) -> None:
    ours, _ = packed(64, 256, 64, torch.float16)
    x = torch.ones(2, 256).to(DEVICE, torch.float16)
    with pytest.raises(ValueError, match="of 1 groups in 128 inputs, but a group has 64"):
        ours.matmul(x, empty_sums(x, 256, 128))


def test_what_does_not_fit_is_refused() -> None:
    ours, _ = packed(64, 128, 128, torch.float16)
    with pytest.raises(ValueError, match=r"\(2, 127\) torch.float16, expected \[T, 128\]"):
        ours.matmul(torch.zeros(2, 127).half())
    with pytest.raises(ValueError, match=r"torch.bfloat16, expected .* torch.float16"):
        ours.matmul(torch.zeros(2, 128).bfloat16())
