"""Triton's kernels compiled ahead of time, for devices that need not be here, and what their machine code tells.

Compiling happens in a process of its own, since in the suite's own one Triton interprets. The disassembler is the one that Triton
brings; that it is missing is an error.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|IMMA|QGMMA)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel, how it is called, and for which architecture (80, 90, 100).

    `types` are Triton's, by argument; pointers are aligned to 16 bytes, and so are multiples of 16 the numbers in `multiples`.
    A constant that is a type is given by its name. `weights`: that a program multiplies in one turn of its loop.
    """

    name: str
    module: str
    kernel: str
    architecture: int
    types: tuple[str, ...]
    constants: dict[str, Any]
    multiples: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)
    weights: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """What was counted, in the whole kernel or in a turn of its longest loop.

    `spills`: instructions that read or write local memory; `shared`: bytes; `widest`: bits of the widest global load.
    `ahead`: of a turn, the loads straight to shared memory, for a later turn, by their width in bits; `waited_for`: other loads.
    `per_weight`: instructions of a turn times threads, over its weights; None without `weights`.
    `units`: the kinds of tensor core instructions.
    """

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    widest: int
    ahead: dict[int, int]
    waited_for: int
    per_weight: float | None
    units: tuple[str, ...]

    def __str__(self) -> str:
        per_weight = "" if self.per_weight is None else f"{self.per_weight:.2f}"
        return f"{self.name:58}{self.target:9}{self.registers:5}{self.spills:8}{self.shared:8}{self.widest:8}{per_weight:>12}"


HEADER = f"{'kernel, types, launch':58}{'target':9}{'regs':>5}{'spills':>8}{'shared':>8}{'widest':>8}{'per weight':>12}"


def compile_all(cases: list[Case]) -> list[Code]:
    """In one other process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = json.dumps([asdict(case) for case in cases])
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, env=environment, cwd=ROOT, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [_code(fields) for fields in json.loads(done.stdout.splitlines()[-1])]


def _code(fields: dict[str, Any]) -> Code:
    ahead = {int(bits): count for bits, count in fields["ahead"].items()}  # keys of JSON are texts
    return Code(**fields | {"ahead": ahead, "units": tuple(fields["units"])})


def _compile(case: Case) -> Code:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(case.module), case.kernel)
    types = {"fp16": tl.float16, "bf16": tl.bfloat16}
    constants = {name: types.get(value, value) for name, value in case.constants.items()}
    signature = dict(zip(kernel.arg_names, case.types, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, kind in enumerate(case.types) if kind.startswith("*") or kernel.arg_names[i] in case.multiples]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", case.architecture, 32), options=dict(case.options))
    ptx = compiled.asm["ptx"]
    instructions, usage = _disassemble(compiled.asm["cubin"])
    loop = _longest_loop(instructions)
    units = {found[0] for _, text in instructions if (found := TENSOR_CORES.findall(text))}
    return Code(
        name=case.name,
        target=re.findall(r"\.target\s+(\w+)", ptx)[0],
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=sum(bool(re.search(r"\b(STL|LDL)\b", text)) for _, text in instructions),
        shared=compiled.metadata.shared,
        widest=max(_widths(instructions, "LDGSTS|LDG"), default=0),
        ahead=_widths(loop, "LDGSTS"),
        waited_for=sum(_widths(loop, "LDG").values()),
        per_weight=round(len(loop) * 32 * compiled.metadata.num_warps / case.weights, 2) if case.weights else None,
        units=tuple(sorted(units)),
    )


def _disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], str]:
    """(address, text) of each instruction, and the listing with what the kernel uses."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", listing)
    assert found, "nothing was disassembled"
    return [(int(address, 16), text) for address, text in found], listing


def _longest_loop(instructions: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The longest piece that a branch at its end goes back to the beginning of; with what is jumped over."""
    longest: list[tuple[int, str]] = []
    for last, (at, text) in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            body = [one for one in instructions[: last + 1] if one[0] >= int(branch[1], 16)]
            longest = max(longest, body, key=len)
    return longest


def _widths(instructions: list[tuple[int, str]], names: str) -> dict[int, int]:
    """How many of the loads with these names there are, by width in bits."""
    counts: dict[int, int] = {}
    for _, text in instructions:
        if found := re.search(rf"\b(?:{names})((?:\.\w+)+)", text):
            width = re.search(r"\.[US]?(8|16|64|128|256)\b", found[1])
            bits = int(width[1]) if width else 32
            counts[bits] = counts.get(bits, 0) + 1
    return counts


if __name__ == "__main__":
    cases = [Case(**fields | {"types": tuple(fields["types"])}) for fields in json.load(sys.stdin)]
    print(json.dumps([asdict(_compile(case)) for case in cases]))
