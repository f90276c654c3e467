"""`python -m tests.kernels.compiled` compiles every kernel for every architecture and prints docs/kernels.md.

It takes minutes. What is more than its cap goes to standard error, and the status is then 1.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

from tests.kernels.attention_cases import SPILLS, attention
from tests.kernels.cases import ARCHITECTURES, DTYPES, every_case
from tests.kernels.machine_code import ALL, Case, Code, compile_all, faults
from tests.rehearsal import compile as launched

COLUMNS = ("kernel", "types", "configuration", "for", "registers", "spills", "shared", "load", "a number")
TEXT = """<!-- Made by `python -m tests.kernels.compiled > docs/kernels.md` with triton {version}. -->
# What the Triton kernels compile to

Nothing here was timed, and none of it ran on a GPU: the kernels were compiled ahead of time for A100 (sm_80), H100 and H200
(sm_90) and B200 (sm_100), and their machine code was counted. The suite does the same for a part of the table and fails where a
figure is over its cap, which stands behind it; so does the command above for all of it. How long the kernels should take by these
counts, and what they are to reach: [kernel_targets.md](kernel_targets.md). What whole engines launch, also on consumer cards
(sm_120), is in the last table; of experts it is in the first one too.

* **registers**: of a thread, and the cap. {most} is all that there are, so that there only spills are a limit.
* **spills**: instructions that read or write registers' values in local memory, and the cap: 0, but for {spilling} settings,
  which put values away before their loops and take them up after them. In a loop nothing spills anywhere.
* **shared**: bytes of shared memory that a program takes, and the cap.
* **load**: bits of the widest load from global memory; 128 is promised unless a "-" follows.
* **a number**: instructions of a turn of the main loop times threads, over the weights or the numbers of keys and values
  that the turn takes; and the cap, where there is one.
* **group**: of attention, query heads to a head of keys and values; of 4-bit weights, inputs that share a scale.
* **rows** of an expert's product: the tokens of a block, 16 in decoding. "In pairs" are 4-bit weights that are put in order when
  they are loaded.

fp32 is there to be exact, not fast: its products go without tensor cores. Eight-bit keys and values are int8 or E4M3 codes, which
become numbers of the query's type. For fp16 the hardware converts E4M3 from compute capability 8.9 on; below it, and for bf16
everywhere, codes are taken apart by their bits. They are always written by their bits.

**Earlier versions of Triton.** The part of the table that the suite compiles was compiled with 3.6.0 and 3.7.1 too. All of it
compiles, and no loop spills. Products with 4-bit weights take a quarter to a half more instructions there: with 16 rows, bf16 and
groups of 128, 2.4 to 3.0 a weight in place of 1.8 to 2.2, with 32 rows 3.7 to 4.3 in place of 2.7 to 2.9, since those compilers
lay the activations out for numbers of 8 bits, which `ldmatrix` cannot load. Attention's decoding takes 2.5 to 2.6 a number with
3.6.0 in place of 2.1 to 2.2, and 2.3 with 3.7.1. So 3.8 is the version to have for 4-bit models. The kernels' tests pass with
torch 2.11.0 and Triton 3.6.0, but for one line of its interpreter (not of its compiler), which NumPy 2.4 no longer takes: the
`int` of an array with one element.

## Which types compile where

The attention kernel, one query token, head dimension 128.

{types}

## All kernels

{table}

{launched}"""


def main() -> int:
    cases, types = every_case(), formats()
    native = [case for case in types if case not in cases]
    codes = dict(zip((case.label for case in cases + native), compile_all(cases + native), strict=True))
    missed = [f"{case.label}: {fault}" for case in cases for fault in faults(case, codes[case.label])]
    print("\n".join(missed), file=sys.stderr)
    table = _table(COLUMNS, [_row(case, codes[case.label]) for case in cases])
    about = {"version": version("triton"), "most": ALL, "spilling": len(SPILLS), "types": _types(types, codes)}
    print(TEXT.format(**about, table=table, launched=launched.table(launched.read().values())), end="")
    return 1 if missed else 0


def formats() -> list[Case]:
    """Decoding in every type, also where the GPU has no such type."""
    found = []
    for arch in ARCHITECTURES:
        found += [attention(dtype, codes, 128, 1, arch) for dtype in DTYPES for codes in (None, "int8")]
        found += [attention("fp16", "e4m3", 128, 1, arch, is_native=is_native) for is_native in (False, True)]
        found += [attention("bf16", "e4m3", 128, 1, arch)]
    return found


def _types(cases: list[Case], codes: dict[str, Code | str]) -> str:
    rows: dict[str, list[str]] = {}
    for case in cases:
        code = codes[case.label]
        rows.setdefault(case.dtype, [case.dtype]).append(f"no: {code}" if isinstance(code, str) else "yes")
    return _table(("types", *(f"sm_{arch}" for arch in ARCHITECTURES)), list(rows.values()))


def _row(case: Case, code: Code | str) -> list[str]:
    about = [case.name, case.dtype, case.setting, f"sm_{case.architecture}"]
    if isinstance(code, str):
        return [*about, code, "", "", "", ""]
    load = f"{code.widest}{'' if case.wide else ' -'}"
    each = "" if code.per_number is None else f"{code.per_number:.2f}"
    each += f" of {case.per_number:g}" if case.per_number else ""
    used = [f"{code.registers} of {case.registers}", f"{code.spills} of {case.spills}", f"{code.shared} of {case.shared}"]
    return [*about, *used, load, each]


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
