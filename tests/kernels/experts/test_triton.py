"""Triton's kernels for chosen experts equal their definition in float64: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from tests.kernels.bfloat16 import compute_bfloat16
from tests.kernels.errors import rms_ratio
from tests.kernels.experts.weights import TOLERANCE, dense, fp8, stored
from tests.kernels.int4.weights import poisoned
from tests.rehearsal import interpreter
from vlserve.kernels.experts import ExpertWeights, Int4Experts, Mxfp4Experts
from vlserve.kernels.experts.launch import block_rows, most_blocks
from vlserve.kernels.experts.pairs import pack_experts_for_gpu, unpack_experts
from vlserve.kernels.experts.reference import combine_ref, experts_matmul_ref
from vlserve.kernels.experts.types import ours

pytest.importorskip("triton")
experts_triton: Any = pytest.importorskip("vlserve.kernels.experts.triton")
__all__ = ["poisoned"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOSEN = torch.tensor([[4, 2], [3, 9], [2, 4], [0, 1], [4, 3]], dtype=torch.int32)  # this rank has 2, 3 and 4


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
        interpreter.install(monkeypatch)


def moved(weights: ExpertWeights) -> ExpertWeights:
    there = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return replace(weights, **{name: one.to(DEVICE) for name, one in there.items() if isinstance(one, torch.Tensor)})


@pytest.mark.parametrize("experts,tokens,each", [(3, 5, 2), (1, 1, 1), (7, 300, 2), (2, 40, 1), (4, 1, 4)])
def test_blocks_have_every_choice_once(experts: int, tokens: int, each: int, poisoned: None) -> None:
    """In the order in which they came, by expert; blocks are full but for an expert's last, and what is not needed says so."""
    torch.manual_seed(tokens)
    chosen = torch.randint(0, experts + 3, (tokens, each), dtype=torch.int32)
    chosen[chosen == 2] = 3  # one is chosen by nobody
    found = experts_triton.routes_triton(chosen.to(DEVICE), experts, 1)
    local = ours(chosen, experts, 1).flatten()
    order, blocks = found.blocks.order.cpu(), found.blocks.blocks.t().tolist()
    assert torch.equal(order.long(), local.argsort(stable=True))
    assert len(blocks) == most_blocks(tokens * each, experts, found.blocks.rows)
    at = 0
    used = [block for block in blocks if block[0] >= 0]
    assert blocks[: len(used)] == used
    for number in range(experts + 1):
        count = int((local == number).sum())
        for first in range(at, at + count, found.blocks.rows):
            assert used.pop(0) == [number, first, min(first + found.blocks.rows, at + count)]
        at += count
    assert not used


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", stored(torch.float32))
def test_the_product_equals_its_definition(name: str, dtype: torch.dtype, poisoned: None) -> None:
    """With a row of x a token, and a row a choice; one of the experts is another rank's."""
    given = moved(stored(dtype)[name])
    experts, outputs, inputs = given.size
    bias = torch.randn(experts, outputs).to(DEVICE, dtype)
    routes = experts_triton.routes_triton(CHOSEN.to(DEVICE), 3, 2)
    weights = pack_experts_for_gpu(given) if isinstance(given, Int4Experts | Mxfp4Experts) else given
    for one in (weights, given) if isinstance(given, Int4Experts) and weights is not given else (weights,):
        for rows, added in ((5, None), (10, bias)):
            x = torch.randn(rows, inputs).to(DEVICE, dtype)
            got = experts_triton.experts_matmul_triton(x, one, routes, added)
            assert got.dtype == dtype and rms_ratio(got, experts_matmul_ref(x.double(), given, routes, added)) < TOLERANCE[dtype]
            assert not got[torch.tensor([3, 6, 7])].any()


@pytest.mark.parametrize("name", ("int4, 32", "int4, 128", "int4, a row", "mxfp4"))
def test_pairs_are_what_they_were_made_from(name: str) -> None:
    given = stored(torch.float16)[name]
    back = unpack_experts(pack_experts_for_gpu(given))
    assert type(back) is type(given)
    assert all(torch.equal(getattr(back, field.name), getattr(given, field.name)) for field in fields(given))
