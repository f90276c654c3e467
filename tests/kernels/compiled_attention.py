"""The decoder step's Triton kernels compiled for cards that are not there: registers, spills and load widths.

A program of its own, since in the suite's process Triton interprets. It prints a line of JSON for each case;
`python -m tests.kernels.compiled_attention all` has every kernel, type, shape and architecture.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlserve.kernels.attention_launch import choose_tiling
from vlserve.kernels.kv_codes import TINY
from vlserve.kernels.paged_attention_triton import MERGED_AT_ONCE, _attention_kernel, _merge_kernel
from vlserve.kernels.rms_norm_triton import _kernel as _rms_norm_kernel
from vlserve.kernels.rotary_store_triton import _kernel as _rotary_store_kernel
from vlserve.kernels.silu_mul_triton import _kernel as _silu_mul_kernel

ARCHITECTURES = (80, 90, 100)
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "FFMA")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    name: str
    arch: int
    registers: int
    spills: int  # instructions that write registers to memory or read them back
    shared: int  # bytes
    loads: dict[str, int]  # from global memory, by opcode with its width
    per_number: float  # instructions of the main loop for each key or value's number
    loop: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`types` are those of the arguments that are no constants; None: no such tensor."""

    name: str
    kernel: Any
    types: list[str | None]
    constants: dict[str, Any]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    numbers: int = 0  # keys' and values' that a turn of the main loop takes

    def compile(self) -> Compiled:
        names = self.kernel.arg_names
        given = dict(zip((name for name in names if name not in self.constants), self.types, strict=True))
        constants = self.constants | {name: None for name, kind in given.items() if kind is None}
        signature = {name: given.get(name) or "constexpr" for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        lines, registers = _disassemble(compiled.asm["cubin"])
        opcodes = Counter(_opcode(text) for _, text in lines)
        loop = _main_loop(lines)
        return Compiled(
            name=self.name,
            arch=self.arch,
            registers=registers,
            spills=opcodes["STL"] + opcodes["LDL"],
            shared=compiled.metadata.shared,
            loads=dict(Counter(text.split()[0] for _, text in lines if _opcode(text) in ("LDG", "LDGSTS"))),
            per_number=round(loop.total() * 32 * self.num_warps / self.numbers, 2) if self.numbers else 0,
            loop=dict(loop.most_common(12)),
        )


def _disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], int]:
    """(address, instruction) one after another, without predicates; and registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([triton.knobs.nvidia.cuobjdump.path, what, file.name], capture_output=True, text=True, check=True)
            for what in ("-sass", "-res-usage")
        )
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", sass.stdout)
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    assert found and registers, usage
    return [(int(address, 16), text.strip()) for address, text in found], int(registers[1])


def _opcode(text: str) -> str:
    return text.split()[0].split(".")[0]


def _main_loop(lines: list[tuple[int, str]]) -> Counter[str]:
    """The one without comparisons of its scores, which multiplies as well: of two like it, the shorter."""
    loops = []
    for at, text in lines:
        back = re.search(r"^BRA\b.*\b0x([0-9a-f]+)", text)
        if back and int(back[1], 16) < at:
            loop = Counter(_opcode(inside) for place, inside in lines if int(back[1], 16) <= place <= at)
            if any(loop[name] for name in PRODUCTS) and loop["LDGSTS"]:
                loops.append(loop)
    return min(loops, key=Counter.total, default=Counter())


def attention(dtype: str, codes: str | None, dim: int, longest_query: int, arch: int, page: int = 16, group: int = 7) -> Case:
    itemsize = 1 if codes else 4 if dtype == "fp32" else 2
    tiling = choose_tiling(longest_query, group, dim, itemsize, arch)
    stored, scales = ("*i16", "*i16") if codes else (f"*{dtype}", None)
    types = [
        f"*{dtype}",
        "*fp32",
        "*fp32",
        f"*{dtype}",
        stored,
        scales,
        stored,
        scales,
        "*i32",
        "*i32",
        "i32",
        "i32",
        "i32",
        "fp32",
    ]
    constants = {
        "KV_HEADS": 4, "GROUP": group, "DIM": dim, "DIM_PADDED": triton.next_power_of_2(dim), "TOKENS": tiling.tokens,
        "PAGE": page, "ROWS": tiling.rows, "TILE": tiling.positions, "IS_CODED": bool(codes), "IS_E4M3": codes == "e4m3",
        "IS_NATIVE": codes == "e4m3" and arch >= 89, "LIFT": 6 if codes and dtype == "fp16" else 0,
    }  # fmt: skip
    return Case(
        name=f"{'decode' if longest_query == 1 else 'prefill'} {dtype} {codes or '':4} dim {dim} page {page}",
        kernel=_attention_kernel,
        types=types,
        constants=constants,
        arch=arch,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        numbers=2 * tiling.positions * dim,
    )


def merge(dtype: str, dim: int, arch: int) -> Case:
    constants = {
        "KV_HEADS": 4, "GROUP": 7, "DIM": dim, "DIM_PADDED": triton.next_power_of_2(dim), "TOKENS": 1, "TILE": 64,
        "PARTS": MERGED_AT_ONCE,
    }  # fmt: skip
    types = [f"*{dtype}", "*fp32", "*fp32", "*i32", "i32", "i32", "i32"]
    return Case(name=f"merge {dtype} dim {dim}", kernel=_merge_kernel, types=types, constants=constants, arch=arch)


def rotary_store(dtype: str, codes: str | None, dim: int, has_norms: bool, arch: int) -> Case:
    stored = {None: f"*{dtype}", "int8": "*i8", "e4m3": "*u8"}[codes]
    scales, norm = ("*i16" if codes else None), (f"*{dtype}" if has_norms else None)
    largest = {None: 1.0, "int8": 127.0, "e4m3": 448.0}[codes]
    constants = {
        "HEADS": 28, "HEADS_PADDED": 32, "KV_HEADS": 4, "KV_HEADS_PADDED": 4, "HALF": dim // 2,
        "HALF_PADDED": triton.next_power_of_2(dim // 2), "HAS_NORMS": has_norms, "IS_CODED": bool(codes),
        "IS_E4M3": codes == "e4m3", "LARGEST": largest, "TINY": TINY,
    }  # fmt: skip
    tensors = [*[f"*{dtype}"] * 4, "*fp32", "*fp32", norm, norm, stored, scales, stored, scales, "*i64"]
    return Case(
        name=f"rotary store {dtype} {codes or '':4} dim {dim}{' with norms' if has_norms else ''}",
        kernel=_rotary_store_kernel,
        types=[*tensors, *["i32"] * 8, "fp32"],
        constants=constants,
        arch=arch,
    )


def rms_norm(dtype: str, width: int, adds: bool, arch: int) -> Case:
    padded = triton.next_power_of_2(width)
    return Case(
        name=f"{'add ' if adds else ''}rms norm {dtype} width {width}",
        kernel=_rms_norm_kernel,
        types=[*[f"*{dtype}"] * 5, "i32", "i32", "fp32"],
        constants={"WIDTH": width, "WIDTH_PADDED": padded, "ADDS": adds},
        arch=arch,
        num_warps=min(16, max(1, padded // 256)),
    )


def silu_mul(dtype: str, width: int, arch: int) -> Case:
    constants = {"WIDTH": width, "BLOCK": 1024}
    return Case(
        name=f"silu mul {dtype} width {width}", kernel=_silu_mul_kernel, types=[f"*{dtype}"] * 2, constants=constants, arch=arch
    )


def every_case() -> Iterator[Case]:
    for arch, dtype in product(ARCHITECTURES, ("bf16", "fp16")):
        for longest_query, dim, codes in product((1, 512), (64, 80, 96, 128), (None, "int8", "e4m3")):
            yield attention(dtype, codes, dim, longest_query, arch)
        for page in (32, 64, 128):
            yield attention(dtype, None, 128, 1, arch, page=page)
        for codes, has_norms in product((None, "int8", "e4m3"), (False, True)):
            yield rotary_store(dtype, codes, 128, has_norms, arch)
        yield merge(dtype, 128, arch)
        for width, adds in product((896, 3584, 5120), (False, True)):
            yield rms_norm(dtype, width, adds, arch)
        yield silu_mul(dtype, 18944, arch)
    for arch in ARCHITECTURES:
        for longest_query, dim in product((1, 512), (64, 128)):
            yield attention("fp32", None, dim, longest_query, arch)


def some_cases() -> Iterator[Case]:
    """What the suite compiles."""
    for arch in ARCHITECTURES:
        yield attention("bf16", None, 128, 1, arch)
    yield attention("fp16", None, 80, 1, 80)
    yield attention("bf16", "int8", 128, 1, 80)
    yield attention("bf16", "e4m3", 128, 1, 90)
    yield attention("bf16", None, 128, 512, 80)
    yield attention("bf16", None, 128, 512, 90)
    yield merge("bf16", 128, 90)
    yield rotary_store("bf16", "e4m3", 128, True, 80)
    yield rms_norm("bf16", 3584, True, 80)
    yield silu_mul("bf16", 18944, 80)


if __name__ == "__main__":
    for case in every_case() if sys.argv[1:] == ["all"] else some_cases():
        print(json.dumps(asdict(case.compile())), flush=True)
