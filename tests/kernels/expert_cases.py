"""The kernels of chosen experts among the compiled ones: what their machine code may take, by type, kind of weights and block."""

from __future__ import annotations

from collections.abc import Iterator

from tests.kernels.machine_code import ALL, Case
from vlserve.kernels.experts.launch import choose_paired_tile, choose_tile

ARCHITECTURES = (80, 90, 100, 120)
KINDS = {"16 bits": (0, 0), "4 bits": (1, 16), "fp8, a row": (2, 0), "fp8": (2, 128)}  # as in triton.py, with inputs of a group
PAIRS = {"mxfp4": 32, "int4, 128": 128, "int4, 32": 32, "int4, 64": 64}
PER_NUMBER = {"fp8": 5.0, "mxfp4": 5.5, "int4, 128": 4.5}  # of bfloat16 in the least blocks, as decoding's are


def product_case(dtype: str, kind: str, rows: int, arch: int) -> Case:
    """`kind`: one of KINDS."""
    number, group = KINDS[kind]
    tile = choose_tile(rows, is_exact=dtype == "fp32", is_coded=number > 0, group=group)
    x = f"*{dtype}"
    scales, zeros = {0: (None, None), 1: (x, "*u8"), 2: ("*fp32", None)}[number]
    return Case(
        name="experts' product",
        dtype=dtype,
        setting=f"{kind}, {rows} rows",
        module="vlserve.kernels.experts.triton",
        kernel="_matmul",
        architecture=arch,
        types=(x, "*u8" if number else x, scales, zeros, x, x, "*i32", "*i32", *["i32"] * 7),
        constants={
            "KIND": number,
            "GROUP": group,
            "BLOCK_T": rows,
            "BLOCK_N": tile.outputs,
            "BLOCK_K": tile.inputs,
            "STAGES": tile.stages,
        },
        multiples=("num_outputs", "num_inputs", "offset"),
        options={"num_warps": tile.warps} | ({"maxnreg": tile.registers} if tile.registers else {}),
        numbers=tile.outputs * tile.inputs,
        registers=ALL,
        shared=96 * 1024,
        per_number=PER_NUMBER.get(kind) if (dtype, rows) == ("bf16", 16) else None,
        wide=number != 1 and dtype != "fp32",
        ahead=number != 1 and dtype != "fp32",
        in_suite=(dtype, rows) == ("bf16", 16) and number != 1,
    )


def paired_case(dtype: str, kind: str, rows: int, arch: int) -> Case:
    """`kind`: one of PAIRS."""
    tile, x = choose_paired_tile(rows, is_exact=dtype == "fp32"), f"*{dtype}"
    zeros = None if kind == "mxfp4" else "*i32"
    return Case(
        name="experts' product in pairs",
        dtype=dtype,
        setting=f"{kind}, {rows} rows",
        module="vlserve.kernels.experts.triton_pairs",
        kernel="_pairs_matmul",
        architecture=arch,
        types=(x, "*i32", "*i32", zeros, x, x, "*i32", "*i32", *["i32"] * 8),
        constants={"GROUP": PAIRS[kind], "BLOCK_T": rows, "BLOCK_N": tile.outputs, "STAGES": tile.stages},
        multiples=("num_outputs", "num_inputs"),
        options={"num_warps": tile.warps} | ({"maxnreg": tile.registers} if tile.registers else {}),
        numbers=tile.outputs * 128,
        registers=ALL,
        shared=96 * 1024,
        per_number=PER_NUMBER.get(kind) if (dtype, rows) == ("bf16", 16) else None,
        wide=True,
        ahead=dtype != "fp32",
        in_suite=(dtype, rows) == ("bf16", 16) and kind in ("mxfp4", "int4, 128"),
    )


def beside(arch: int) -> Iterator[Case]:
    """Choices in order, and the sum of what experts give."""
    module, i32 = "vlserve.kernels.experts.triton", "i32"
    yield Case(
        name="choices by expert",
        dtype="int32",
        setting="128 experts",
        module=module,
        kernel="_sort",
        architecture=arch,
        types=("*i32", "*i32", "*i32", *[i32] * 4),
        constants={"BINS": 256, "CHUNK": 512, "ROWS": 16},
        wide=False,
        in_suite=arch == 90,
    )
    yield Case(
        name="experts' sum",
        dtype="bf16",
        setting="8 choices",
        module=module,
        kernel="_combine",
        architecture=arch,
        types=("*bf16", "*fp32", "*bf16", i32),
        constants={"CHOICES": 8, "BLOCK": 1024},
        multiples=("width",),
        in_suite=arch == 90,
    )


def expert_cases() -> Iterator[Case]:
    """bfloat16 in blocks of every size, others in the least; of kinds that are seldom, too."""
    for arch in ARCHITECTURES:
        yield from beside(arch)
        yield from (product_case("bf16", kind, rows, arch) for kind in ("16 bits", "fp8") for rows in (16, 32, 64))
        yield from (paired_case("bf16", kind, rows, arch) for kind in ("mxfp4", "int4, 128") for rows in (16, 32, 64))
        yield from (product_case("bf16", kind, 16, arch) for kind in ("fp8, a row", "4 bits"))
        yield from (paired_case("bf16", kind, 16, arch) for kind in ("int4, 32", "int4, 64"))
        yield from (product_case("fp16", kind, 16, arch) for kind in ("16 bits", "fp8"))
        yield from (paired_case("fp16", kind, 16, arch) for kind in ("mxfp4", "int4, 128"))
        yield from (product_case("fp32", kind, 16, arch) for kind in ("16 bits", "fp8", "4 bits"))
        yield paired_case("fp32", "mxfp4", 16, arch)
