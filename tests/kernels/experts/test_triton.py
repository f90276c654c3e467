"""Triton's kernels for chosen experts equal their definition in float64: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from tests.kernels.bfloat16 import compute_bfloat16
from tests.kernels.errors import rms_ratio
from tests.kernels.experts.weights import TOLERANCE, mxfp4, stored
from tests.kernels.int4.weights import poisoned
from tests.rehearsal import interpreter
from vlserve.kernels import experts as experts_room
from vlserve.kernels.experts import ExpertWeights, Int4Experts, Mxfp4Experts, PackedExperts, PairedExperts
from vlserve.kernels.experts.launch import block_rows, every_size, most_blocks
from vlserve.kernels.experts.pairs import pack_experts_for_gpu, unpack_experts
from vlserve.kernels.experts.reference import combine_ref, dequantize_ref, experts_matmul_ref
from vlserve.kernels.experts.types import ours

pytest.importorskip("triton")
experts_triton: Any = pytest.importorskip("vlserve.kernels.experts.triton")
__all__ = ["poisoned"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OF_EVERY_SIZE = ("dense", "fp8, a row", "fp8, 128, cut", "int4, 16", "int4, 32", "int4, 64", "int4, 128", "mxfp4")
CHOSEN = torch.tensor([[4, 2], [3, 9], [2, 4], [0, 1], [4, 3]], dtype=torch.int32)  # this rank has 2, 3 and 4


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        compute_bfloat16(monkeypatch)
        interpreter.install(monkeypatch)


def moved(weights: ExpertWeights) -> ExpertWeights:
    assert not isinstance(weights, PackedExperts)
    there = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return replace(weights, **{name: one.to(DEVICE) for name, one in there.items() if isinstance(one, torch.Tensor)})  # type: ignore[arg-type]


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
    """In blocks of 16, 32 and 64 choices, one of whose experts is another rank's; with a row of x a token, and one a choice."""
    given = moved(stored(dtype)[name])
    experts, outputs, inputs = given.size
    bias = torch.randn(experts, outputs).to(DEVICE, dtype)
    weights = pack_experts_for_gpu(given) if isinstance(given, Int4Experts | Mxfp4Experts) else given
    sizes = ((5, 16, 1, None), (5, 16, 2, bias), (30, 32, 1, bias), (60, 64, 2, None))
    for tokens, rows, each, added in sizes if name in OF_EVERY_SIZE else sizes[:2]:
        chosen = CHOSEN.repeat(12, 1)[:tokens].to(DEVICE)
        routes = experts_triton.routes_triton(chosen, 3, 2)
        assert routes.blocks.rows == rows
        x = torch.randn(each * tokens, inputs).to(DEVICE, dtype)
        got = experts_triton.experts_matmul_triton(x, weights, routes, added)
        assert got.dtype == dtype and rms_ratio(got, experts_matmul_ref(x.double(), given, routes, added)) < TOLERANCE[dtype]
        assert not got[((chosen < 2) | (chosen > 4)).flatten()].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_powers_of_two_are_exact(dtype: torch.dtype) -> None:
    """Of MXFP4: also those that float16 has not, which meet inputs that make them small."""
    weights = mxfp4(1, 4, 32, lowest=100, highest=150)
    weights.scales[0, 0], weights.scales[0, 1] = 0, 1  # 2^-127, which is none of the normal numbers
    scaled = torch.eye(32) if dtype == torch.bfloat16 else torch.eye(32) * 2.0**-14
    routes = experts_triton.routes_triton(torch.zeros(32, 1, dtype=torch.int32, device=DEVICE), 1, 0)
    got = experts_triton.experts_matmul_triton(scaled.to(DEVICE, dtype), moved(pack_experts_for_gpu(weights)), routes, None)
    want = dequantize_ref(weights)[0].T * scaled[0, 0].double()
    assert torch.equal(got.cpu(), want.to(dtype))


@pytest.mark.parametrize("name", ("dense", "fp8, 128, cut", "mxfp4", "int4, 32"))
def test_a_rank_that_has_none_of_the_chosen_reads_no_weights(name: str, poisoned: None) -> None:
    weights = stored(torch.float16)[name]
    weights = moved(pack_experts_for_gpu(weights) if isinstance(weights, Int4Experts | Mxfp4Experts) else weights)
    spoilt = {field.name: getattr(weights, field.name) for field in fields(weights)}
    for tensor in spoilt.values():
        if isinstance(tensor, torch.Tensor):
            tensor.view(torch.uint8).fill_(255)
    routes = experts_triton.routes_triton(torch.tensor([[7, 9], [0, 1]], dtype=torch.int32, device=DEVICE), 3, 2)
    bias = torch.full(weights.size[:2], float("nan"), dtype=torch.float16, device=DEVICE)
    x = torch.ones(2, weights.size[2], dtype=torch.float16, device=DEVICE)
    assert not experts_triton.experts_matmul_triton(x, weights, routes, bias).any()


@pytest.mark.parametrize("name", ("dense", "fp8, 128, cut", "mxfp4", "int4, 128"))
def test_a_token_is_the_same_beside_others(name: str) -> None:
    """In blocks of one size; the weights are read in the same order however many tokens there are."""
    given = stored(torch.float32 if name == "dense" else torch.float16)[name]
    weights = moved(pack_experts_for_gpu(given) if isinstance(given, Int4Experts | Mxfp4Experts) else given)
    x = torch.randn(5, weights.size[2]).to(DEVICE, torch.float32 if name == "dense" else torch.float16)
    together = experts_triton.experts_matmul_triton(x, weights, experts_triton.routes_triton(CHOSEN.to(DEVICE), 3, 2), None)
    for token in (0, 4):
        routes = experts_triton.routes_triton(CHOSEN[token : token + 1].to(DEVICE), 3, 2)
        alone = experts_triton.experts_matmul_triton(x[token : token + 1], weights, routes, None)
        torch.testing.assert_close(alone, together[2 * token : 2 * token + 2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("choices,width", [(2, 40), (3, 1100)])
def test_the_sum(choices: int, width: int, dtype: torch.dtype, poisoned: None) -> None:
    out, weights = torch.randn(4 * choices, width).to(DEVICE, dtype), torch.rand(4, choices).to(DEVICE)
    got = experts_triton.combine_triton(out, weights)
    assert got.dtype == dtype and rms_ratio(got, combine_ref(out.double(), weights)) < TOLERANCE[dtype]
    if dtype == torch.float32:
        assert torch.equal(experts_triton.combine_triton(out[choices : 2 * choices], weights[1:2]), got[1:2])


def test_the_assemblers_text_gives_what_is_interpreted() -> None:
    """Both halves of each number that a GPU is told to make of two codes, for all codes but NaN's."""
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    numbers = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn)
    texts = {torch.bfloat16: experts_triton.BFLOAT16_OF_E4M3.value, torch.float16: experts_triton.FLOAT16_OF_E4M3.value}
    for dtype, text in texts.items():
        for number, code in zip(numbers.to(dtype), codes, strict=True):
            other = (code * 7 + 1) % 0x7F
            first, second = assembled(text, code | other << 8 | code << 16 | (code ^ 0x80) << 24, dtype)
            beside = torch.tensor(other, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
            assert torch.equal(first, torch.stack((number, beside))) and torch.equal(second, torch.stack((number, -number)))


def assembled(text: str, given: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What PTX makes of a register: prmt, shifts, and, lop3 with (a & b) | c, and fma of two numbers of 16 bits."""

    def pair(bits: int) -> torch.Tensor:
        return torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.uint16).view(dtype)

    known = {"$2": given}
    for name, *operands in (line.replace(",", "").split() for line in re.findall(r"^(?!\{|\.reg|\})(.+);", text, re.M)):
        to, *values = operands[0], *(known[one] if one in known else int(one, 0) for one in operands[1:])
        if name.startswith("mov"):
            known[to] = values[0]
        elif name.startswith("prmt"):
            parts = values[0].to_bytes(4, "little") + values[1].to_bytes(4, "little")
            known[to] = int.from_bytes(bytes(parts[values[2] >> 4 * place & 7] for place in range(4)), "little")
        elif name.startswith("shr"):
            known[to] = values[0] >> values[1]
        elif name.startswith("and"):
            known[to] = values[0] & values[1]
        elif name.startswith("lop3"):
            assert values[3] == 0xEA
            known[to] = values[0] & values[1] | values[2]
        else:
            assert name.startswith("fma.rn")
            a, b, c = (pair(value).double() for value in values)
            low, high = (a * b + c).to(dtype).view(torch.uint16).tolist()
            known[to] = low | high << 16
    return [pair(known["$0"]), pair(known["$1"])]


@pytest.mark.parametrize("name", ("int4, 32", "int4, 128", "int4, a row", "mxfp4"))
def test_pairs_are_what_they_were_made_from(name: str) -> None:
    given = stored(torch.float16)[name]
    assert isinstance(given, Int4Experts | Mxfp4Experts)
    packed = pack_experts_for_gpu(given)
    assert isinstance(packed, PairedExperts)
    back = unpack_experts(packed)
    assert type(back) is type(given)
    assert all(torch.equal(getattr(back, field.name), getattr(given, field.name)) for field in fields(given))


@pytest.mark.parametrize("experts,each", [(128, 8), (32, 4), (8, 8), (1, 1), (3, 2)])
def test_every_size_of_blocks_is_warmed_up(experts: int, each: int) -> None:
    found = every_size(experts, each)
    assert set(found) == {block_rows(tokens * each, experts) for tokens in range(1, 3000)}
    for rows, tokens in found.items():
        assert block_rows(tokens * each, experts) == rows


def test_all_is_launched_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights that say they are on a GPU: nothing that a step of any length launches is new."""
    launched: set[tuple[Any, ...]] = set()

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def note(*args: Any, **sizes: Any) -> None:
                launched.add((self.name, *(one.dtype for one in args if isinstance(one, torch.Tensor)), *sizes.items()))

            return note

    monkeypatch.setattr(experts_room, "runs_triton", lambda x: True)
    for name in ("_sort", "_matmul", "_combine"):
        monkeypatch.setattr(experts_triton, name, Noted(name))
    weights = stored(torch.float16)["dense"]
    experts_room.launch_all(weights, top_k=2, dtype=torch.float16)
    known = set(launched)
    assert len(known) == 3 + 3 + 1
    for tokens in range(1, 200):
        chosen = torch.zeros(tokens, 2, dtype=torch.int32)
        out = experts_room.experts_matmul(torch.zeros(tokens, 72).half(), weights, experts_room.routes(chosen, 3))
        experts_room.experts_matmul(torch.zeros(2 * tokens, 72).half(), weights, experts_room.routes(chosen, 3))
        experts_room.combine(out, torch.zeros(tokens, 2))
    assert launched == known
