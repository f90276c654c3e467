"""Sums of activations are the same from norms, the gate and a kernel of their own: interpreted, or compiled for a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.kernels.int4.weights import poisoned
from vlserve.kernels.gate import silu_mul
from vlserve.kernels.group_sums import group_sums
from vlserve.kernels.group_sums.reference import empty_sums, group_sums_ref
from vlserve.kernels.int4_pairs import pack_for_gpu
from vlserve.kernels.norms import add_rms_norm, rms_norm

pytest.importorskip("triton")
from tests.kernels.bfloat16 import compute_bfloat16
from vlserve.kernels.gate import triton as gate_triton
from vlserve.kernels.group_sums import triton as sums_triton
from vlserve.kernels.norms import triton as norms_triton

__all__ = ["poisoned"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
# inputs, inputs of a group; of the first the block is not full, the third is one group
SIZES = [(20, 128), (128, 128), (129, 256), (160, 32), (896, 128), (1100, 64), (2432, 32)]
ROWS = (1, 7)
Make = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of x [T, 2K] and the room for the sums, activations [T, K]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)


def by_hand(x: torch.Tensor, group: int) -> torch.Tensor:
    """In float64, number by number: input k is in plane k // 32 of its block."""
    is_half, each = x.dtype == torch.float16, min(group, 128)
    groups = -(-x.shape[1] // 128) * 128 // each
    plain, offset = torch.zeros(groups, len(x)).double(), torch.zeros(groups, len(x)).double()
    for k, column in enumerate(x.double().T):
        plain[k // each] += column
        offset[k // each] += column * (1024 if k // 32 % 2 == 0 else 64)
    kinds = torch.stack((plain, offset) if is_half else (plain,), 1)
    return kinds.reshape(-(-x.shape[1] // 128), -1, len(x))


def close(got: torch.Tensor, x: torch.Tensor, want: torch.Tensor) -> None:
    """Up to the order in which float32 numbers are added."""
    assert got.dtype == torch.float32 and got.shape == want.shape
    largest = float(x.double().abs().sum(1).max()) * (1024 if x.dtype == torch.float16 else 1)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_kernel_of_their_own(size: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    inputs, group = size
    x = torch.randn(rows, inputs).to(dtype)
    want = by_hand(x, group)
    for implementation in (group_sums_ref, group_sums, sums_triton.group_sums_triton):
        out = empty_sums(x.to(DEVICE), inputs, group)
        assert implementation(x.to(DEVICE), out) is out
        close(out, x, want)


MAKERS: dict[str, tuple[Make, Make]] = {
    "rms_norm": (
        lambda x, sums: rms_norm(*halves(x), 1e-6, sums),
        lambda x, sums: norms_triton.rms_norm_triton(*halves(x), 1e-6, sums),
    ),
    "add_rms_norm": (
        lambda x, sums: add_rms_norm(halves(x)[0], *halves(x), 1e-6, sums)[0],
        lambda x, sums: norms_triton.add_rms_norm_triton(halves(x)[0], *halves(x), 1e-6, sums)[0],
    ),
    "silu_mul": (silu_mul, gate_triton.silu_mul_triton),
}


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [T, K], whose rows lie apart, and a weight [K]."""
    return x[:, : x.shape[1] // 2], x[0, x.shape[1] // 2 :]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_what_makes_activations_sums_them(maker: str, size: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    inputs, group = size
    x = torch.randn(rows, 2 * inputs).to(DEVICE, dtype)
    for implementation in MAKERS[maker]:
        sums = empty_sums(x, inputs, group)
        made = implementation(x, sums)
        assert made.shape == (rows, inputs)
        close(sums, made.cpu(), by_hand(made.cpu(), group))  # those of the rounded numbers


@pytest.mark.parametrize("maker", MAKERS)
def test_activations_do_not_change(maker: str) -> None:
    x = torch.randn(3, 2 * 300).to(DEVICE, torch.float16)
    with_sums = MAKERS[maker][1](x, empty_sums(x, 300, 32))
    plain = {
        "rms_norm": lambda: norms_triton.rms_norm_triton(*halves(x), 1e-6),
        "add_rms_norm": lambda: norms_triton.add_rms_norm_triton(halves(x)[0], *halves(x), 1e-6)[0],
        "silu_mul": lambda: gate_triton.silu_mul_triton(x),
    }[maker]()
    assert torch.equal(with_sums, plain)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("tokens,inputs", [(2, 300), (3, 512)])
def test_room_that_does_not_fit_is_refused(tokens: int, inputs: int, maker: str) -> None:
    x = torch.randn(3, 2 * 300).to(DEVICE, torch.float16)
    for implementation in MAKERS[maker]:
        with pytest.raises(ValueError, match=r"no room for those of \(3, 300\) torch.float16"):
            implementation(x, empty_sums(x[:tokens], inputs, 128))


def test_room_is_what_weights_in_pairs_take() -> None:
    codes, scales = torch.zeros(64, 80, dtype=torch.uint8), torch.ones(64, 5).half()  # 160 inputs, groups of 32
    packed = pack_for_gpu(codes, scales, torch.zeros_like(scales, dtype=torch.uint8))
    assert packed.empty_sums(torch.zeros(3, 1).half()).shape == (2, 8, 3)
