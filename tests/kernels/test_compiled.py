"""What Triton makes of the kernels for A100, H100 and H200, and B200: no spills, wide loads, few instructions a weight.

`pytest -s` shows the table. Each configuration of launch.json is compiled. Where more is counted than is allowed here, the kernel
has become slower, whatever the interpreter says of its results.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.kernels.compiled import HEADER, Case, Code, compile_all
from vlserve.kernels.launch import Launch, launches

pytest.importorskip("triton")

ARCHITECTURES = (80, 90, 100)
PAIRS = "vlserve.kernels.awq_pairs_triton"
# By rows of a program. In the time in which its memory gives a weight, a B200 can issue 2.3 instructions, others 3.3 and more.
# With each further 16 rows a weight takes an eighth of one four times: twice in products, twice in what is added up.
PER_WEIGHT = {16: 2.5, 32: 3.1, 64: 6.2}
REGISTERS = {16: 170, 32: 192, 64: 180}
SHARED = {16: 48 * 1024, 32: 48 * 1024, 64: 64 * 1024}
FINER = {80: ("fp16", 32), 90: ("bf16", 32), 100: ("fp16", 64)}  # inputs of a group, by architecture


def product(architecture: int, launch: Launch, dtype: str, group: int) -> Case:
    sizes = f"{launch.block_t} x {launch.block_n}, {launch.warps} warps, {launch.stages} stages"
    blocks = {"BLOCK_T": launch.block_t, "BLOCK_N": launch.block_n}
    return Case(
        name=f"4 bits, group {group}, {dtype}, {sizes}",
        module=PAIRS,
        kernel="_matmul",
        architecture=architecture,
        types=(f"*{dtype}", "*i32", "*i32", "*i32", "*fp32", "*fp32", *["i32"] * 6),
        constants=blocks | {"GROUP": group, "STAGES": launch.stages, "FACTOR": dtype, "ASM": True},
        options={"num_warps": launch.warps} | ({"maxnreg": launch.registers} if launch.registers else {}),
        weights=launch.block_n * 128,
    )


def products() -> list[tuple[Case, Launch]]:
    """Every launch of the table in both types, that of 16 narrow rows with finer groups as well."""
    found = {}
    for architecture, table in launches().items():
        number = int(architecture.removeprefix("sm_"))
        for launch in table.values():
            kinds = [(dtype, 128) for dtype in ("fp16", "bf16")]
            kinds += [FINER[number]] * ((launch.block_t, launch.block_n) == (16, 64))
            for kind in kinds:
                case = product(number, launch, *kind)
                found[case.name, number] = case, launch
    return list(found.values())


def others() -> list[Case]:
    """(name, module, kernel, types, constants, multiples of 16) of what works beside the products, or where they do not."""
    int8, awq, i32 = "vlserve.kernels.head_triton", "vlserve.kernels.awq_triton", "i32"
    blocks = {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 128}
    dense = {"GROUP": 128, "BLOCK_N": 16, "BLOCK_K": 256}
    fine = {"GROUP": 16, "ONE_GROUP": False, "SPLITS": 1, "BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 32}
    old = ("*u8", "*bf16", "*u8")
    kernels: list[tuple[str, str, str, tuple[str, ...], dict[str, Any], tuple[str, ...]]] = [
        ("group sums, fp16", PAIRS, "_group_sums", ("*fp16", "*fp32", i32, i32), {"GROUPS": 2, "BLOCKS": 16}, ()),
        ("parts added up, bf16", PAIRS, "_add_parts", ("*fp32", "*bf16", i32, i32), {"BLOCK": 256}, ()),
        ("pairs spread out, bf16", PAIRS, "_dequantize", ("*i32", "*i32", "*i32", "*bf16", *[i32] * 3), {"GROUP": 128}, ()),
        ("bytes spread out, bf16", awq, "_dequantize", (*old, "*bf16", *[i32] * 3), dense, ("num_inputs",)),
        ("bytes, group 16, bf16", awq, "_matmul", ("*bf16", *old, "*fp32", *[i32] * 4), fine, ("num_inputs",)),
        ("8-bit head, bf16", int8, "_matmul", ("*bf16", "*i8", "*fp32", "*bf16", *[i32] * 3), blocks, ("num_inputs",)),
    ]
    return [
        Case(name=name, module=module, kernel=kernel, architecture=number, types=types, constants=constants, multiples=multiples)
        for name, module, kernel, types, constants, multiples in kernels
        for number in ARCHITECTURES
    ]


@cache
def table() -> dict[tuple[str, int], Code]:
    """All compiled, once a process, by name and architecture."""
    cases = [case for case, _ in products()] + others()
    codes = compile_all(cases)
    print("\n" + HEADER, *codes, sep="\n")
    return {(case.name, case.architecture): code for case, code in zip(cases, codes, strict=True)}


def named(case: object) -> str:
    return f"sm_{case.architecture}, {case.name}" if isinstance(case, Case) else ""


@pytest.mark.parametrize("case,launch", products(), ids=named)
def test_products_with_four_bits(case: Case, launch: Launch) -> None:
    code, rows, threads = table()[case.name, case.architecture], launch.block_t, 32 * launch.warps
    assert not code.spills and code.registers <= REGISTERS[rows] and code.shared <= SHARED[rows], code
    assert code.units and "UTCHMMA" not in code.units, "a B200's own units take the weights from another memory, by way of others"
    words, activations = launch.block_n * 16 * 4, rows * 128 * 2  # bytes of a turn
    assert code.ahead[128] == (words + activations) // (16 * threads), "weights and activations are asked for by 16 bytes"
    assert not code.waited_for and min(code.ahead) >= 32, "a turn would wait for its scales"
    if case.constants["GROUP"] == 128:
        assert code.per_weight is not None and code.per_weight <= PER_WEIGHT[rows], code


@pytest.mark.parametrize("case", others(), ids=named)
def test_other_kernels(case: Case) -> None:
    code = table()[case.name, case.architecture]
    assert not code.spills and code.registers <= 128 and code.shared <= 48 * 1024, code
    assert bool(code.units) == (case.kernel == "_matmul"), code
