"""Products with chosen experts, in the forms in which their weights are published; tokens choose all experts alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.cards import Card
from benchmarks.gpu.case import Built, Case
from benchmarks.gpu.counted import counted
from benchmarks.gpu.predict import Grid, Kernel
from benchmarks.gpu.sizes import GROUP, Work, int4_bytes
from vlserve.kernels.experts import (
    DenseExperts,
    ExpertWeights,
    Fp8Experts,
    Int4Experts,
    Mxfp4Experts,
    experts_matmul,
    prepare,
    routes,
)
from vlserve.kernels.experts.launch import Tile, block_rows, choose_paired_tile, choose_tile, most_blocks
from vlserve.kernels.experts.reference import experts_matmul_ref
from vlserve.kernels.experts.types import MXFP4_GROUP

FORMS = {"16 bits": "16 bits", "fp8": "fp8", "int4": "int4, 128", "mxfp4": "mxfp4"}  # with their names in docs/kernels.md
TOKENS = (1, 16, 64, 2048)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A layer's gate and up projection of `experts`, of which a token chooses `each`."""

    name: str
    experts: int
    each: int
    outputs: int
    inputs: int
    forms: tuple[str, ...]


QWEN3_30B = Mixture(name="30b-a3b", experts=128, each=8, outputs=1536, inputs=2048, forms=("16 bits", "fp8", "int4"))
GPT_OSS_20B = Mixture(name="gpt-oss-20b", experts=32, each=4, outputs=5760, inputs=2880, forms=("mxfp4",))
TINY_MIXTURE = Mixture(name="tiny", experts=4, each=2, outputs=64, inputs=128, forms=tuple(FORMS))


def expert_product_cases(*, quick: bool = False) -> Iterator[Case]:
    for mixture in (QWEN3_30B, GPT_OSS_20B):
        for form in mixture.forms:
            yield from (expert_product(mixture, form, tokens) for tokens in (TOKENS[:1] if quick else TOKENS))


def expert_product(mixture: Mixture, form: str, tokens: int) -> Case:
    """x [T, K] times the weights of each token's experts, in bfloat16."""
    experts, outputs, inputs = mixture.experts, mixture.outputs, mixture.inputs
    choices = tokens * mixture.each
    read = min(experts, choices)
    weights = read * weight_bytes(form, outputs * inputs)
    rows = block_rows(choices, experts)
    tile = _tile(form, rows)

    def plan(arch: int, multiprocessors: int) -> str:
        blocks = most_blocks(choices, experts, rows)
        sizes = f"{rows} x {tile.outputs}, {tile.warps} warps, {tile.stages} stages"
        return f"{-(-outputs // tile.outputs), blocks} programs of {sizes}"

    def kernel(card: Card) -> Kernel:
        code = counted(_kernel_name(form), "bf16", f"{FORMS[form]}, {rows} rows", card.architecture)
        blocks = read * -(-choices // (read * rows))
        programs = blocks * -(-outputs // tile.outputs)
        turn = weight_bytes(form, tile.outputs * tile.inputs)
        return Kernel(
            bytes=weights + 2 * tokens * inputs + 2 * choices * outputs,
            flops=2 * choices * outputs * inputs,
            instructions=code.per_number * blocks * outputs * inputs,
            through_l2=blocks * (weights / read + 2 * rows * inputs * -(-outputs // tile.outputs)),
            waits=4,  # a program's block, its choices, and what they are multiplied with
            grid=Grid(programs=programs, ahead=(tile.stages - 1) * turn, warps=tile.warps, counted=code),
        )

    def build(device: torch.device) -> Built:
        stored, x = make_weights(mixture, form, device), torch.randn(tokens, inputs, device=device).bfloat16()
        if device.type == "meta":
            return Built(run=lambda: None, want=lambda: x)
        chosen = torch.arange(choices, device=device).view(tokens, mixture.each) % experts
        where, prepared = routes(chosen, experts), prepare(stored)
        return Built(
            run=lambda: experts_matmul(x, prepared, where), want=lambda: experts_matmul_ref(x.double(), stored, where).double()
        )

    return Case(
        model=mixture.name,
        kernel=f"experts' product, {form}",
        shape=f"{mixture.each} of {experts} x {outputs} x {inputs}, {tokens} tokens",
        work=Work(weights + 2 * tokens * inputs + 2 * choices * outputs, 2 * choices * outputs * inputs),
        plan=plan,
        kernels=lambda card: [kernel(card)],
        build=build,
    )


def weight_bytes(form: str, number: int) -> int:
    """Of so many weights of one expert."""
    by_form = {
        "16 bits": 2 * number,
        "fp8": number + 4 * number // GROUP,
        "int4": int4_bytes(number),
        "mxfp4": number // 2 + number // MXFP4_GROUP,
    }
    return by_form[form]


def make_weights(mixture: Mixture, form: str, device: torch.device) -> ExpertWeights:
    shape = mixture.experts, mixture.outputs
    inputs = mixture.inputs

    def whole(most: int, *more: int) -> torch.Tensor:
        return torch.randint(0, most, (*shape, *more), dtype=torch.uint8, device=device)

    def scales(*more: int) -> torch.Tensor:
        return torch.rand(*shape, *more, device=device) / 100 + 0.001

    match form:
        case "16 bits":
            return DenseExperts(weight=torch.randn(*shape, inputs, dtype=torch.bfloat16, device=device))
        case "fp8":
            codes = whole(0x7F, inputs).view(torch.float8_e4m3fn)
            return Fp8Experts(codes=codes, scales=scales(inputs // GROUP), block=GROUP)
        case "int4":
            groups = inputs // GROUP
            return Int4Experts(codes=whole(256, inputs // 2), scales=scales(groups).bfloat16(), zeros=whole(16, groups))
    groups = inputs // MXFP4_GROUP
    return Mxfp4Experts(codes=whole(256, groups, MXFP4_GROUP // 2), scales=whole(8, groups) + 118)


def _tile(form: str, rows: int) -> Tile:
    if form in ("int4", "mxfp4"):
        return choose_paired_tile(rows, is_exact=False)
    return choose_tile(rows, is_exact=False, is_coded=form == "fp8", group=GROUP if form == "fp8" else 0)


def _kernel_name(form: str) -> str:
    return "experts' product in pairs" if form in ("int4", "mxfp4") else "experts' product"
