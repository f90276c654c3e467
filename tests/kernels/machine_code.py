"""Triton's kernels compiled ahead of time, for GPUs that need not be here, and what their machine code tells.

Compiling happens in a process of its own, since in the suite's own one Triton interprets. The disassembler is the one that Triton
brings; that it is missing is an error. Which kernels there are is not known here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|IMMA|QGMMA)\b")
PRODUCTS = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|IMMA|QGMMA|FFMA)\b")
ALL = 255  # registers that a thread can have: then only spills are a limit
Instructions = list[tuple[int, str]]  # address and text


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel, how it is called, for which architecture (80, 86, 90, ...), and the most that it may take.

    `types` are Triton's, of the arguments that are no constants, None where there is no such tensor; pointers are aligned to 16
    bytes, and so are multiples of 16 the numbers in `multiples`. A constant that is a type is given by its name. `numbers`:
    weights, or keys' and values' numbers, that a program takes in one turn of its loop; `per_number`: instructions for each.
    `spills`: outside of loops; in them nothing may spill. `shared`: bytes. `wide`: whether it reads 16 bytes at once; `ahead`:
    whether its loop does, for a later turn.
    """

    name: str
    dtype: str
    setting: str
    module: str
    kernel: str
    architecture: int
    types: tuple[str | None, ...]
    constants: dict[str, Any]
    multiples: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)
    numbers: int = 0
    registers: int = 128
    spills: int = 0
    shared: int = 48 * 1024
    per_number: float | None = None
    wide: bool = True
    ahead: bool = False
    in_suite: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} | {self.dtype} | {self.setting} | sm_{self.architecture}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """What was counted, in the whole kernel or in a turn of its main loop.

    `spills`: instructions that read or write local memory, `looped` of them in loops; `shared`: bytes; `widest`: bits of the
    widest global load. `ahead`: of a turn, the loads straight to shared memory, for a later turn, by their width in bits;
    `waited_for`: other loads. `per_number`: instructions of a turn times threads, over its numbers; None without them.
    `units`: the kinds of tensor core instructions.
    """

    registers: int
    spills: int
    looped: int
    shared: int
    widest: int
    ahead: dict[int, int]
    waited_for: int
    per_number: float | None
    units: tuple[str, ...]


def compile_all(cases: list[Case]) -> list[Code | str]:
    """In one other process; a text is Triton's reason to refuse."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    given = json.dumps([asdict(case) for case in cases])
    command = [sys.executable, "-m", "tests.kernels.machine_code"]
    done = subprocess.run(command, env=environment, cwd=ROOT, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [one if isinstance(one, str) else _code(one) for one in json.loads(done.stdout.splitlines()[-1])]


def faults(case: Case, code: Code | str) -> list[str]:
    """What is more, or less, than the case allows."""
    if isinstance(code, str):
        return [f"refused: {code}"]
    found = []
    if code.spills > case.spills:
        found.append(f"{code.spills} instructions spill, {case.spills} allowed")
    if code.looped:
        found.append(f"{code.looped} of them in loops")
    if code.registers > case.registers:
        found.append(f"{code.registers} registers, {case.registers} allowed")
    if code.shared > case.shared:
        found.append(f"{code.shared} bytes of shared memory, {case.shared} allowed")
    if case.wide and code.widest < 128:
        found.append(f"loads of {code.widest} bits, 128 promised")
    if case.ahead and (not code.ahead.get(128) or code.ahead.get(64)):
        found.append(f"loads ahead by bits: {code.ahead}, those of 128 promised")
    if case.per_number is not None and not (code.per_number and code.per_number <= case.per_number):
        found.append(f"{code.per_number} instructions a number, {case.per_number} allowed")
    return found


def _code(fields: dict[str, Any]) -> Code:
    ahead = {int(bits): count for bits, count in fields["ahead"].items()}  # keys of JSON are texts
    return Code(**fields | {"ahead": ahead, "units": tuple(fields["units"])})


def _compile(case: Case) -> Code | str:
    import triton.language as tl

    kernel = getattr(import_module(case.module), case.kernel)
    types = {"fp16": tl.float16, "bf16": tl.bfloat16}
    names = kernel.arg_names
    given = dict(zip((name for name in names if name not in case.constants), case.types, strict=True))
    constants = {name: types.get(value, value) if isinstance(value, str) else value for name, value in case.constants.items()}
    constants |= {name: None for name, kind in given.items() if kind is None}
    signature = {name: given.get(name) or "constexpr" for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in case.multiples]
    return count(kernel, signature, constants, aligned, case.architecture, case.options, case.numbers)


def count(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: list[int],
    architecture: int,
    options: dict[str, int],
    numbers: int = 0,
) -> Code | str:
    """A kernel of these types, "constexpr" for constants, whose arguments at `aligned` are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(options))
    except (TritonError, RuntimeError) as error:  # an architecture that Triton does not know is the latter
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return str(cause)
    instructions, usage = _disassemble(compiled.asm["cubin"])
    loops = _loops(instructions)
    loop = _main_loop(loops)
    spills = {one for one in instructions if re.search(r"\b(STL|LDL)\b", one[1])}
    units = {found[0] for _, text in instructions if (found := TENSOR_CORES.findall(text))}
    return Code(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=len(spills),
        looped=len(spills & {one for loop in loops for one in loop}),
        shared=compiled.metadata.shared,
        widest=max(_widths(instructions, "LDGSTS|LDG"), default=0),
        ahead=dict(_widths(loop, "LDGSTS")),
        waited_for=_widths(loop, "LDG").total(),
        per_number=round(len(loop) * 32 * compiled.metadata.num_warps / numbers, 2) if numbers else None,
        units=tuple(sorted(units)),
    )


def _disassemble(cubin: bytes) -> tuple[Instructions, str]:
    """The instructions, and the listing with what the kernel uses."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", listing)
    assert found, "nothing was disassembled"
    return [(int(address, 16), text) for address, text in found], listing


def _loops(instructions: Instructions) -> list[Instructions]:
    """The pieces that a branch at their end goes back to the beginning of, with what is jumped over."""
    loops = []
    for last, (at, text) in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            loops.append([one for one in instructions[: last + 1] if one[0] >= int(branch[1], 16)])
    return loops


def _main_loop(loops: list[Instructions]) -> Instructions:
    """The one that multiplies and loads ahead, of two the shorter, as attention's without masks is; else the longest."""
    main = [loop for loop in loops if any(PRODUCTS.search(text) for _, text in loop) and _widths(loop, "LDGSTS")]
    return min(main, key=len) if main else max(loops, key=len, default=[])


def _widths(instructions: Instructions, names: str) -> Counter[int]:
    """How many of the loads with these names there are, by width in bits."""
    counts: Counter[int] = Counter()
    for _, text in instructions:
        if found := re.search(rf"\b(?:{names})((?:\.\w+)+)", text):
            width = re.search(r"\.[US]?(8|16|64|128|256)\b", found[1])
            counts[int(width[1]) if width else 32] += 1
    return counts


if __name__ == "__main__":
    given = [Case(**fields | {name: tuple(fields[name]) for name in ("types", "multiples")}) for fields in json.load(sys.stdin)]
    results = [_compile(case) for case in given]
    print(json.dumps([one if isinstance(one, str) else asdict(one) for one in results]))
