"""Attention's kernels among the compiled ones: what their machine code may take, by types, dimension, page and group."""

from __future__ import annotations

from typing import Any

from tests.kernels.machine_code import ALL, Case
from vlserve.kernels.attention.launch import choose_tiling

# prefill's instructions a number by (codes, before Hopper): with a dimension of 64, and with 128, of which 80 and 96 use a part.
# More than decoding's, since a program has 128 rows; before Hopper scores and codes go through registers that are too few
PER_NUMBER = {(False, False): (11, 7), (False, True): (14, 11.2), (True, False): (28, 17), (True, True): (38, 33)}
SPILLS = {  # what is left of them, for want of registers: what the loops do not use is put away before them
    ("attention, prefill", "bf16 int8", "dim 128, page 16, group 1", 80): 3,
    ("attention, prefill", "bf16 int8", "dim 128, page 16, group 1", 90): 18,
    ("attention, prefill", "bf16 int8", "dim 128, page 16, group 4", 90): 15,
    ("attention, prefill", "bf16", "dim 128, page 16, group 7, window 4096", 80): 20,
    ("attention, prefill", "bf16 int8", "dim 128, page 16, group 7, window 4096", 80): 3,
}
WINDOW = 4096  # tokens, of Mistral's first models
GPT_OSS: Any = {"group": 8, "sinks": True}  # with heads of 64, and a window of 128 in every other layer


def attention(
    dtype: str,
    codes: str | None,
    dim: int,
    longest_query: int,
    arch: int,
    *,
    page: int = 16,
    group: int = 7,
    is_native: bool | None = None,
    window: int = 0,
    sinks: bool = False,
) -> Case:
    itemsize = 4 if dtype == "fp32" else 1 if codes else 2
    tiling = choose_tiling(longest_query, group, dim, itemsize, arch)
    registers = tiling.most_registers(is_coded=bool(codes), has_sinks=sinks, window=window)
    if is_native is None:
        is_native = codes == "e4m3" and arch >= 89 and dtype == "fp16"  # bfloat16 always goes by the bits
    stored, scales = ("*i16", "*i16") if codes else (f"*{dtype}", None)
    constants = {
        "KV_HEADS": 4, "GROUP": group, "DIM": dim, "DIM_PADDED": power_of_2(dim), "TOKENS": tiling.tokens,
        "WINDOW": window, "PAGE": page, "ROWS": tiling.rows, "TILE": tiling.positions,
        "IS_CODED": bool(codes), "IS_E4M3": codes == "e4m3",
        "IS_NATIVE": is_native, "LIFT": 6 if codes and dtype == "fp16" else 0,
    }  # fmt: skip
    decodes = longest_query == 1
    tile_bytes = tiling.positions * power_of_2(dim) * (1 if codes else itemsize)
    is_wide = tile_bytes >= 16 * 32 * tiling.num_warps  # else a thread has fewer than 16 bytes to ask for
    kinds = {None: "", "int8": " int8", "e4m3": " E4M3 native" if is_native else " E4M3 by bits"}
    of_64, of_128 = PER_NUMBER[bool(codes), arch < 90]
    most = (9 if codes else 4.5) if decodes else of_64 if dim == 64 else of_128 * power_of_2(dim) / dim
    about = (
        "attention, decode" if decodes else "attention, prefill",
        f"{dtype}{kinds[codes]}",
        f"dim {dim}, page {page}, group {group}" + beside(window, sinks),
    )
    return Case(
        name=about[0],
        dtype=about[1],
        setting=about[2],
        module="vlserve.kernels.attention.triton",
        kernel="_attention_kernel",
        architecture=arch,
        types=(f"*{dtype}", "*fp32", "*fp32", f"*{dtype}", stored, scales, stored, scales, "*i32", "*i32")
        + ("*fp32" if sinks else None,)
        + ("i32", "i32", "i32", "fp32"),
        constants=constants,
        options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages} | ({"maxnreg": registers} if registers else {}),
        numbers=2 * tiling.positions * dim,
        registers=170 if decodes and dtype != "fp32" and not (codes and sinks and window) else ALL,
        shared=160 * 1024,
        spills=SPILLS.get((*about, arch), 0),
        per_number=None if dtype == "fp32" else round(most, 1),
        wide=is_wide,
        ahead=is_wide and dtype != "fp32",
    )


def merge(dtype: str, dim: int, arch: int, window: int = 0, *, sinks: bool = False) -> Case:
    constants = {
        "KV_HEADS": 4, "GROUP": 7, "DIM": dim, "DIM_PADDED": power_of_2(dim), "TOKENS": 1, "WINDOW": window,
        "TILE": 64, "PARTS": 16,
    }  # fmt: skip
    return Case(
        name="attention, merge",
        dtype=dtype,
        setting=f"dim {dim}" + beside(window, sinks),
        module="vlserve.kernels.attention.triton",
        kernel="_merge_kernel",
        architecture=arch,
        types=(f"*{dtype}", "*fp32", "*fp32", "*i32", "*fp32" if sinks else None, *["i32"] * 3),
        constants=constants,
        in_suite=dtype == "bf16" and arch == 90,
    )


def beside(window: int, sinks: bool) -> str:
    return (f", window {window}" if window else "") + (", sinks" if sinks else "")


def power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
