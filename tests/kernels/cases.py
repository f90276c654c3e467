"""Every Triton kernel, type, configuration and architecture, with the most that its machine code may take.

The suite compiles those that are `in_suite`, compiled.py all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from tests.kernels.attention_cases import GPT_OSS, WINDOW, attention, merge, power_of_2
from tests.kernels.expert_cases import expert_cases
from tests.kernels.machine_code import ALL, Case
from vlserve.kernels.int4_pairs import launch as launching
from vlserve.kernels.int4_pairs.launch import CARD, Launch, fitted, launches
from vlserve.kernels.kv_cache.types import TINY
from vlserve.kernels.sampling.noise import ROUNDS

ARCHITECTURES = (80, 90, 100)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES = (*HALF, "fp32")
# W4A16, by rows of a program. In the time in which its memory gives a weight, a B200 can issue 2.3 instructions, others 3.3 and
# more. With each further 16 rows a weight takes an eighth of one four times: twice in products, twice in what is added up.
PER_WEIGHT = {16: 2.5, 32: 3.5, 64: 4.0}
FINER = {80: ("fp16", 32), 100: ("fp16", 64)}  # inputs of a group, by architecture
FINER_ELSEWHERE = ("bf16", 32)
# as in kernels/sampling/triton.py and triton_filter.py, which only import where Triton is
DRAWN, COLUMNS, GROUP, TURN = 1024, 8, 32, 64
REGISTERS = {16: 170, 32: ALL, 64: ALL}


def four_bits() -> Iterator[Case]:
    """Every launch of the table in both types, that of 16 narrow rows with finer groups as well.

    What a card was timed with needs no other proof that it is fast; it may not spill.
    """
    timed = {name for name, table in json.loads(launching.TABLE.read_text()).items() if CARD in table}
    for name, table in launches().items():
        architecture = int(name.removeprefix("sm_"))
        for dtype, launch, group in _kinds(architecture, table):
            sizes = f"{launch.block_t} x {launch.block_n}, {launch.warps} warps, {launch.stages} stages"
            limit = {"maxnreg": launch.registers} if launch.registers else {}
            yield Case(
                name="4-bit product",
                dtype=dtype,
                setting=f"group {group}, {sizes}",
                module="vlserve.kernels.int4_pairs.triton",
                kernel="_matmul",
                architecture=architecture,
                types=(f"*{dtype}", "*i32", "*i32", "*i32", "*fp32", "*fp32", *["i32"] * 6),
                constants={"BLOCK_T": launch.block_t, "BLOCK_N": launch.block_n, "GROUP": group, "STAGES": launch.stages},
                options={"num_warps": launch.warps} | limit,
                numbers=launch.block_n * 128,
                registers=ALL if name in timed else REGISTERS[launch.block_t],
                shared=(227 if name in timed else 72 if launch.block_t == 64 else 48) * 1024,
                per_number=PER_WEIGHT[launch.block_t] if group == 128 and name not in timed else None,
                ahead=True,
                in_suite=dtype == "bf16" or group < 128,
            )


def _kinds(architecture: int, table: dict[str, Launch]) -> Iterator[tuple[str, Launch, int]]:
    """(type, launch, inputs of a group)."""
    finer = FINER.get(architecture, FINER_ELSEWHERE)
    for dtype, of_torch in HALF.items():
        for launch in dict.fromkeys(fitted(launch, of_torch) for launch in table.values()):
            yield dtype, launch, 128
            if (launch.block_t, launch.block_n, dtype) == (16, 64, finer[0]):
                yield dtype, launch, finer[1]


def beside(dtype: str, architecture: int) -> Iterator[Case]:
    """What works beside the products of 4-bit weights, or where they do not."""
    pairs, awq, i32, x = "vlserve.kernels.int4_pairs.triton", "vlserve.kernels.int4.triton", "i32", f"*{dtype}"

    def case(name: str, setting: str, module: str, kernel: str, types: tuple[str, ...], **settings: object) -> Case:
        multiples = ("num_inputs",) if module == awq else ()
        given = {"architecture": architecture, "multiples": multiples, "in_suite": dtype == "bf16" and architecture == 80}
        return Case(name=name, dtype=dtype, setting=setting, module=module, kernel=kernel, types=types, **given | settings)  # type: ignore[arg-type]

    if dtype != "fp32":
        sums, dense = {"GROUPS": 2, "BLOCKS": 16}, {"GROUP": 128}
        own = "vlserve.kernels.group_sums.triton"
        yield case("group sums", "2 groups", own, "_kernel", (x, "*fp32", i32, i32), constants=sums)
        parts = ("*fp32", x, i32, i32)
        yield case("parts added up", "", pairs, "_add_parts", parts, constants={"BLOCK": 256}, wide=False)
        yield case(
            "pairs spread out", "group 128", pairs, "_dequantize", ("*i32", "*i32", "*i32", x, *[i32] * 3), constants=dense
        )
    blocks = {"GROUP": 128, "BLOCK_N": 16, "BLOCK_K": 256}
    old = ("*u8", x, "*u8")
    yield case("bytes spread out", "group 128", awq, "_dequantize", (*old, x, *[i32] * 3), constants=blocks, wide=False)
    if dtype != "fp32":
        sizes = {"GROUP": 16, "ONE_GROUP": False, "BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 32}
        yield case("bytes", "group 16", awq, "_matmul", (x, *old, "*fp32", *[i32] * 5), constants=sizes, wide=False)


def head(dtype: str, weight: str, architecture: int, rows: int = 16) -> Case:
    return Case(
        name="head",
        dtype=dtype,
        setting=f"weights {weight}, {rows} rows",
        module="vlserve.kernels.head.triton",
        kernel="_matmul",
        architecture=architecture,
        types=(f"*{dtype}", f"*{weight}", "*fp32" if weight == "i8" else None, f"*{dtype}", *["i32"] * 3),
        constants={"BLOCK_T": rows, "BLOCK_N": 64, "BLOCK_K": 128 if weight == "i8" else 64, "IS_CODED": weight == "i8"},
        multiples=("num_inputs",),
        options={"num_stages": 3 if weight == "i8" else 5},
        shared=96 * 1024,
        in_suite=dtype == "bf16" and rows == 16,
    )


def rotary_store(dtype: str, codes: str | None, has_norms: bool, arch: int) -> Case:
    stored = {None: f"*{dtype}", "int8": "*i8", "e4m3": "*u8"}[codes]
    scales, norm = ("*i16" if codes else None), (f"*{dtype}" if has_norms else None)
    constants = {
        "HEADS": 28, "HEADS_PADDED": 32, "KV_HEADS": 4, "KV_HEADS_PADDED": 4, "HALF": 64, "HALF_PADDED": 64,
        "HAS_NORMS": has_norms, "IS_CODED": bool(codes), "IS_E4M3": codes == "e4m3",
        "LARGEST": {None: 1.0, "int8": 127.0, "e4m3": 448.0}[codes], "TINY": TINY,
    }  # fmt: skip
    kinds = {None: "", "int8": " int8", "e4m3": " E4M3 by bits"}
    return Case(
        name="rotary and store",
        dtype=f"{dtype}{kinds[codes]}",
        setting=f"dim 128{', norms' if has_norms else ''}",
        module="vlserve.kernels.rotary.triton",
        kernel="_kernel",
        architecture=arch,
        types=(*[f"*{dtype}"] * 4, "*fp32", "*fp32", norm, norm, stored, scales, stored, scales, "*i64", *["i32"] * 8, "fp32"),
        constants=constants,
        multiples=("query_token", "query_head", "key_token", "key_head", "value_token", "value_head", "cos_stride", "sin_stride"),
        in_suite=(dtype, codes, has_norms, arch) == ("bf16", "e4m3", True, 80),
    )


def norm(kind: str, dtype: str, width: int, arch: int, *, groups: int = 0) -> Case:
    """kind: as the operations are called; groups: of 128 numbers, whose sums are written as well."""
    is_rms, padded = kind.endswith("rms_norm") and "scaled" not in kind, power_of_2(width)
    x, constants = f"*{dtype}", {"WIDTH": width, "WIDTH_PADDED": padded, "ADDS": kind.startswith("add")}
    is_centred = kind.endswith("layer_norm")
    of_residual = x if constants["ADDS"] else None
    if is_rms:
        constants |= {"GROUPS": groups}
        types = (*[x] * 5, "*fp32" if groups else None, "i32", "i32", "fp32")
    else:
        constants |= {"IS_CENTRED": is_centred}
        types = (*[x] * 3, *[of_residual] * 2, x, x if is_centred else None, "fp32")
    return Case(
        name=kind.replace("_", " "),
        dtype=dtype,
        setting=f"width {width}{with_sums(groups)}",
        module="vlserve.kernels.norms.triton",
        kernel="_rms_kernel" if is_rms else "_layer_kernel",
        architecture=arch,
        types=types,
        constants=constants,
        multiples=("x_stride", "residual_stride"),
        options={"num_warps": min(16, max(1, padded // 256))},
        in_suite=dtype == "bf16" and arch == 80 and kind.startswith("add"),
    )


def silu_mul(dtype: str, arch: int, *, groups: int = 0) -> Case:
    return Case(
        name="silu mul",
        dtype=dtype,
        setting=f"width 18944{with_sums(groups)}",
        module="vlserve.kernels.gate.triton",
        kernel="_kernel",
        architecture=arch,
        types=(f"*{dtype}", f"*{dtype}", "*fp32" if groups else None),
        constants={"WIDTH": 18944, "BLOCK": 1024, "GROUPS": groups},
        in_suite=dtype == "bf16" and arch == 80,
    )


def clamped(dtype: str, arch: int) -> Case:
    return Case(
        name="clamped swiglu",
        dtype=dtype,
        setting="width 2880",
        module="vlserve.kernels.gate.triton",
        kernel="_clamped_kernel",
        architecture=arch,
        types=(f"*{dtype}", f"*{dtype}", "fp32", "fp32"),
        constants={"WIDTH": 2880, "BLOCK": 1024},
        in_suite=dtype == "bf16" and arch == 80,
    )


def drawing(arch: int) -> Iterator[Case]:
    """Top-k and top-p, and the race; logits' rows are aligned to 4 bytes only, so nothing is read by 16."""
    i32, given = "i32", ("*fp32", "*i64", "*fp64")
    turns = {"COLUMNS": COLUMNS, "GROUP": GROUP, "TURN": TURN}
    race = {"COLUMNS": COLUMNS, "BLOCK": DRAWN, "ROUNDS": ROUNDS}
    settings: dict[str, tuple[str, str, tuple[str, ...], dict[str, int], int, int]] = {
        "survey of logits": ("triton_filter", "_survey", (*given, "*fp32", "*fp32", i32, i32, i32), turns, 8, 40),
        "top-k and top-p": (
            "triton_filter",
            "_cut",
            (*given, "*fp32", "*fp32", "*i32", "*fp32", "*i32", i32, i32, i32, i32),
            turns | {"PARTS": 128},
            16,
            80,
        ),
        "race": ("triton", "_race", (*given, "*fp32", "*i32", "*fp32", "*i32", i32, i32, i32), race, 4, 56),
        "race's winner": (
            "triton",
            "_win",
            ("*i64", "*fp64", "*fp32", "*i32", i32),
            {"COLUMNS": COLUMNS, "PARTS": 256},
            1,
            32,
        ),
    }
    for name, (module, kernel, types, constants, warps, registers) in settings.items():
        yield Case(
            name=name,
            dtype="fp32",
            setting="",
            module=f"vlserve.kernels.sampling.{module}",
            kernel=kernel,
            architecture=arch,
            types=types,
            constants=constants,
            options={"num_warps": warps},
            registers=registers,
            wide=False,
            in_suite=arch == 90 and kernel in ("_cut", "_race"),
        )


def with_sums(groups: int) -> str:
    return f", sums of {128 // groups}" if groups else ""


def summed(dtype: str, arch: int) -> Iterator[Case]:
    """What makes inputs of 4-bit products, which writes their sums."""
    yield norm("rms_norm", dtype, 3584, arch, groups=1)
    for width, groups in ((896, 1), (3584, 1), (3584, 4), (5120, 1)):
        yield norm("add_rms_norm", dtype, width, arch, groups=groups)
    for groups in (1, 2):
        yield silu_mul(dtype, arch, groups=groups)


def every_case() -> list[Case]:
    cases = [*four_bits()]
    for arch, dtype in product(ARCHITECTURES, DTYPES):
        cases += beside(dtype, arch)
        if dtype in HALF:
            cases += [head(dtype, dtype, arch), *(head(dtype, "i8", arch, rows) for rows in (16, 64))]
        kinds = (None, "int8", "e4m3")
        dims, widths = ((64, 80, 96, 128), (896, 3584, 5120)) if dtype in HALF else ((64, 128), (3584,))
        cases += [attention(dtype, codes, dim, n, arch) for n, dim, codes in product((1, 512), dims, kinds)]
        cases += [
            attention(dtype, None, 128, n, arch, page=page) for n, page in product((1, 512), (32, 64, 128)) if dtype in HALF
        ]
        if dtype == "bf16":
            groups = product((1, 512), (1, 4, 5, 8), (None, "int8"))
            cases += [attention(dtype, codes, 128, n, arch, group=group) for n, group, codes in groups]
            cases += [attention(dtype, codes, 128, n, arch, window=WINDOW) for n, codes in product((1, 512), (None, "int8"))]
            cases += [merge(dtype, 128, arch, window=WINDOW)]
            cases += [merge(dtype, 64, arch, window=window, sinks=True) for window in (0, 128)]
        if dtype in HALF:
            kinds_and_windows = product((1, 512), kinds, (0, 128))
            cases += [attention(dtype, codes, 64, n, arch, window=window, **GPT_OSS) for n, codes, window in kinds_and_windows]
        cases += [merge(dtype, 128, arch)]
        cases += [rotary_store(dtype, codes, has_norms, arch) for codes, has_norms in product(kinds, (False, True))]
        cases += [norm(kind, dtype, width, arch) for kind, width in product(("rms_norm", "add_rms_norm"), widths)]
        cases += [norm(kind, dtype, 1024, arch) for kind in ("layer_norm", "add_scaled_layer_norm")]
        cases += [norm("add_scaled_rms_norm", dtype, 3200, arch), silu_mul(dtype, arch), clamped(dtype, arch)]
        cases += summed(dtype, arch) if dtype in HALF else ()
    cases += [case for arch in ARCHITECTURES for case in drawing(arch)]
    cases += expert_cases()
    shown = [
        *(attention("bf16", None, 128, n, arch) for n, arch in ((1, 80), (1, 90), (1, 100), (512, 80), (512, 90))),
        attention("bf16", None, 128, 1, 90, page=32),
        *(attention("bf16", codes, 128, n, arch) for codes, n, arch in (("int8", 1, 80), ("e4m3", 1, 90), ("int8", 512, 80))),
        attention("fp16", None, 80, 1, 80),
        *(attention("bf16", None, 128, n, 90, window=WINDOW) for n in (1, 512)),
        *(attention("bf16", None, 64, n, 90, window=128, **GPT_OSS) for n in (1, 512)),
    ]
    return [replace(case, in_suite=True) if case in shown else case for case in cases]
