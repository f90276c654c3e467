"""Kernels reach numbers beyond 2^31: their last program alone is interpreted, on memory of which it touches the end.

Attention's own such test is in attention/test_triton.py. Whole numbers of 32 bits overflow in the interpreter as on a GPU.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tests.kernels.caches import DEVICE
from tests.kernels.errors import TOLERANCE, rms_ratio
from tests.kernels.far import FAR
from vlserve.kernels.experts import DenseExperts, PairedExperts
from vlserve.kernels.experts.pairs import unpack_experts
from vlserve.kernels.experts.reference import dequantize_ref
from vlserve.kernels.experts.types import Blocks, Routes
from vlserve.kernels.gate.reference import silu_mul_ref
from vlserve.kernels.head.reference import head_matmul_ref
from vlserve.kernels.norms.reference import add_rms_norm_ref, add_scaled_norm_ref, layer_norm_ref, rms_norm_ref
from vlserve.kernels.rotary.reference import rotary_store_ref

pytest.importorskip("triton")
from triton.runtime import interpreter

from vlserve.kernels.experts.triton import combine_triton, experts_matmul_triton
from vlserve.kernels.gate.triton import silu_mul_triton
from vlserve.kernels.head.triton import head_matmul_triton
from vlserve.kernels.norms.triton import add_rms_norm_triton, add_scaled_norm_triton, layer_norm_triton, rms_norm_triton
from vlserve.kernels.rotary.triton import rotary_store_triton

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="takes all of a GPU's memory; here untouched pages take none")
HALF = torch.float16
REACHED: dict[str, set[str]] = {}  # as FAR


@pytest.fixture(autouse=True)
def _last_program_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(executor: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.getcallargs(executor.fn, *args, **{key: one for key, one in kwargs.items() if key in executor.arg_names})
        name = f"{executor.fn.__module__.removeprefix('vlserve.kernels.')}.{executor.fn.__name__}"
        tensors = {key: one for key, one in given.items() if isinstance(one, torch.Tensor)}
        REACHED.setdefault(name, set()).update(key for key, one in tensors.items() if one.numel() > 2**31)
        scope = interpreter._patch_lang(executor.fn)
        try:
            converted = {k: one if k in executor.constexprs else interpreter._implicit_cvt(one) for k, one in given.items()}
            grid = (*executor.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            interpreter.interpreter_builder.set_grid_idx(*(number - 1 for number in grid))
            executor.fn(**converted)
        finally:
            scope.restore()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)


def many(width: int, dtype: torch.dtype = HALF) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, width] with more than 2^31 numbers, and its last row, which alone is written."""
    x = torch.empty(2**31 // width + 3, width, dtype=dtype)
    last = torch.randn(1, width).to(dtype)
    x[-1:] = last
    return x, last


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert rms_ratio(got, want) < TOLERANCE[got.dtype]


def test_norms() -> None:
    (x, last), weight = many(8192), torch.randn(8192).to(HALF)
    close(rms_norm_triton(x, weight, 1e-6)[-1:], rms_norm_ref(last.double(), weight.double(), 1e-6))
    close(layer_norm_triton(x, weight, weight, 1e-6)[-1:], layer_norm_ref(last.double(), weight, weight, 1e-6))


def test_norms_of_sums() -> None:
    (x, last), (y, other), weight = many(8192), many(8192), torch.randn(8192).to(HALF)
    for got, want in zip(
        (*add_rms_norm_triton(x, y, weight, 1e-6), *add_scaled_norm_triton(x, y, weight, weight, weight, 1e-6)),
        (*add_rms_norm_ref(last, other, weight, 1e-6), *add_scaled_norm_ref(last, other, weight, weight, weight, 1e-6)),
        strict=True,
    ):
        close(got[-1:], want)


def test_the_gate() -> None:
    x = torch.empty(2**32 // 16384 + 3, 16384, dtype=HALF)  # so that the result has as many too
    x[-1] = torch.randn(16384)
    got = silu_mul_triton(x)
    close(got[-1, -1024:], silu_mul_ref(x[-1:].double())[0, -1024:])


def test_the_head() -> None:
    weight, last = many(8192)
    x = torch.randn(2, 8192).to(HALF)
    close(head_matmul_triton(x, weight)[:, -1:], head_matmul_ref(x.double(), last.double()))


def test_the_cache() -> None:
    caches = [torch.empty(2**31 // (16 * 8 * 128) + 2, 16, 8, 128, dtype=HALF) for _ in range(2)]
    slots = torch.tensor([len(caches[0]) * 16 - 1])
    query, key, value = (torch.randn(1, heads, 128).to(HALF) for heads in (8, 8, 8))
    turn = torch.rand(1, 64), torch.rand(1, 64)
    small = [torch.zeros(1, 1, 8, 128, dtype=HALF) for _ in range(2)]
    rotary_store_ref(query, key, value, turn, (small[0], small[1]), torch.tensor([0]))
    rotary_store_triton(query, key, value, turn, (caches[0], caches[1]), slots)  # the last program writes the value
    assert torch.equal(caches[1][-1, -1], small[1][0, 0])


def last_choice(choices: int, experts: int) -> Routes:
    """All of whose blocks but that of the last choice, of the last expert, are left out."""
    blocks = torch.tensor([[experts - 1], [0], [1]], dtype=torch.int32)
    given = Blocks(order=torch.tensor([choices - 1], dtype=torch.int32), blocks=blocks, rows=16)
    return Routes(experts=torch.empty(choices, 1, dtype=torch.int32), num_experts=experts, blocks=given)


def test_experts() -> None:
    weight = torch.empty(2**31 // (128 * 1024) + 2, 128, 1024, dtype=HALF)
    weight[-1] = torch.randn(128, 1024)
    x = torch.randn(1, 1024).to(HALF)
    got = experts_matmul_triton(x, DenseExperts(weight=weight), last_choice(1, len(weight)), None)
    close(got[:, -64:], head_matmul_ref(x.double(), weight[-1, -64:].double()))


def test_rows_of_experts() -> None:
    (x, last), weight = many(2048), torch.randn(1, 2048, 2048).to(HALF)
    got = experts_matmul_triton(x, DenseExperts(weight=weight), last_choice(len(x), 1), None)
    close(got[-1:, -64:], head_matmul_ref(last.double(), weight[0, -64:].double()))


def test_pairs_of_experts() -> None:
    words, scales = (torch.empty(2**21 + 2, 1, 1, 64, *more, dtype=torch.int32) for more in ((16,), ()))
    words[-1], scales[-1] = torch.randint(0, 2**31, (1, 1, 64, 16)), 0x7F7E7D7C
    x = torch.randn(1, 128).to(HALF)
    weights = PairedExperts(words=words, scales=scales, zeros=None, outputs=64, inputs=128)
    got = experts_matmul_triton(x, weights, last_choice(1, len(words)), None)
    alone = PairedExperts(words=words[-1:].clone(), scales=scales[-1:].clone(), zeros=None, outputs=64, inputs=128)
    close(got, head_matmul_ref(x.double(), dequantize_ref(unpack_experts(alone))[0]))


def test_sums_of_experts() -> None:
    out, last = many(8192)
    got = combine_triton(out, torch.ones(len(out), 1))
    assert torch.equal(got[-1:, -1024:], last[:, -1024:])


def test_it_has_been_seen_of_all_that_are_listed() -> None:
    """With the others of this file."""
    if len(REACHED) < 5:
        pytest.skip("the others were not asked for")
    reached = {name: tuple(sorted(found)) for name, found in REACHED.items() if found}
    attention = {"attention.triton._attention_kernel": ("keys", "values")}
    assert reached | attention == {name: tuple(sorted(found)) for name, found in FAR.items()}
