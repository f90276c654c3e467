"""`python -m tests.rehearsal.compile` runs the rehearsal, compiles all that its engines launch, and writes what it found.

A launch is compiled as its card would: with the specialisations that Triton's binder gives it, for sm_80, sm_90, sm_100 and
sm_120, each with what the product launches on such a card (operations.py); and for sm_89 where a test rehearses such a card: it
has sm_80's instructions and converts E4M3 besides, but has less shared memory. All of that takes minutes, so compiled.json keeps
the results, which a clean clone has. A result is known by a key that holds the hash of the kernel's source with all that it
calls, the version of Triton, the architecture and the signature. So nothing that is kept can speak for other code: what has no
result under its key is compiled by the test that launched it, a few a session, and more of it fails with the command above. With
another version of Triton no key fits; then a sample is compiled by a test of its own, since all would take the suite's time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.kernels.attention_cases import SPILLS
from tests.kernels.machine_code import ALL, count
from tests.kernels.signatures import Signature, source_hash

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("compiled.json")
DOCUMENT = ROOT / "docs/kernels.md"
HEADING = "## What engines launch"
RENEW = "VLSERVE_TEST_RENEW_COMPILED"  # the path of a file to which each test adds what it launched
TRITON = version("triton")
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes of a program, at most
MOST = 8  # that a session compiles
WORKERS, AT_ONCE = 2, 40


@dataclass(frozen=True, slots=True)
class Found:
    """Of one signature on one architecture, as machine_code.Code has it; `refused`: Triton's reason."""

    key: str
    kernel: str
    architecture: int
    signature: str
    registers: int = 0
    spills: int = 0
    looped: int = 0
    shared: int = 0
    widest: int = 0
    refused: str = ""

    def faults(self) -> list[str]:
        about = f"{self.signature} on sm_{self.architecture}"
        if self.refused:
            return [f"{about} is refused: {self.refused}"]
        found = []
        if self.looped or self.spills > spills_allowed(self.signature, self.architecture):
            found.append(f"{about} spills: {self.spills} instructions, {self.looped} of them in loops")
        if self.shared > SHARED[self.architecture]:
            found.append(f"{about} takes {self.shared} bytes of shared memory, and there are {SHARED[self.architecture]}")
        if self.registers > ALL:
            found.append(f"{about} takes {self.registers} registers")
        return found


def spills_allowed(signature: str, architecture: int) -> int:
    """Outside of loops, by attention's prefill: the most that docs/kernels.md allows on that architecture, or on sm_120, whose
    tensor cores take keys and values from registers; by attention in float32, which is there to be exact and not to be fast, with
    heads of 96; and by products of 32 rows in float16 with the finest groups, whose second product takes registers, before and
    after their loop."""
    if signature.startswith("int4_pairs.triton._matmul(x: *fp16") and "GROUP=32, BLOCK_T=32, BLOCK_N=128" in signature:
        return 6 * (architecture == 90)
    if not signature.startswith("attention.triton._attention_kernel"):
        return 0
    if "out: *fp32" in signature and "DIM=96," in signature:
        return 12
    if "TOKENS=1," in signature:
        return 0
    return max([most for (*_, arch), most in SPILLS.items() if arch == architecture] + [24 * (architecture == 120)])


def key_of(signature: Signature, architecture: int) -> str:
    about = (TRITON, architecture, source_hash(signature.module, signature.kernel), str(signature))
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


def read() -> dict[str, Found]:
    return {one["key"]: Found(**one) for one in json.loads(FILE.read_text())["found"]}


def written_with() -> str:
    """The version of Triton."""
    return json.loads(FILE.read_text())["triton"]


def compile_anew(wanted: Iterable[tuple[Signature, int]], workers: int = 1) -> list[Found]:
    """In processes of their own, where Triton compiles."""
    given = list(wanted)
    parts = [given[i::workers] for i in range(workers)]
    command = [sys.executable, "-m", "tests.rehearsal.compile", "--from-stdin"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, **pipes) for _ in parts]
    for process, part in zip(running, parts, strict=True):
        process.stdin.write(json.dumps([(asdict(signature), arch) for signature, arch in part]))  # type: ignore[union-attr]
        process.stdin.close()  # type: ignore[union-attr]
        process.stdin = None
    found = []
    for process, part in zip(running, parts, strict=True):
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        for (signature, arch), counted in zip(part, json.loads(out.splitlines()[-1]), strict=True):
            name = f"{signature.module.removeprefix('vlserve.kernels.')}.{signature.kernel}"
            found.append(Found(key_of(signature, arch), name, arch, str(signature), **counted))
    return found


def _count_given() -> None:
    results = []
    for fields, architecture in json.load(sys.stdin):
        types, constants = dict(fields["types"]), dict(fields["constants"])
        aligned = [i for i, name in enumerate(types) if name in fields["aligned"]]
        kernel = getattr(import_module(fields["module"]), fields["kernel"])
        code = count(kernel, types, constants, aligned, architecture, dict(fields["options"]))
        if isinstance(code, str):
            results.append({"refused": code})
        else:
            results.append({name: getattr(code, name) for name in ("registers", "spills", "looped", "shared", "widest")})
    print(json.dumps(results))


def keep(found: Iterable[Found]) -> None:
    ordered = sorted(found, key=lambda one: (one.kernel, one.architecture, one.signature))
    lines = ",\n".join(json.dumps({name: value for name, value in asdict(one).items() if value != ""}) for one in ordered)
    FILE.write_text(f'{{"triton": "{TRITON}", "found": [\n{lines}\n]}}\n')


def table(found: Iterable[Found]) -> str:
    """A section of docs/kernels.md."""
    rows: dict[str, list[Found]] = {}
    for one in found:
        rows.setdefault(one.kernel, []).append(one)
    lines = [LAUNCHED, "", "| kernel | signatures | for | registers | spills | shared |", "| --- | --- | --- | --- | --- | --- |"]
    for kernel, of_kernel in sorted(rows.items()):
        for arch in SHARED:
            if not (on := [one for one in of_kernel if one.architecture == arch]):
                continue
            most = (max(getattr(one, name) for one in on) for name in ("registers", "spills", "shared"))
            lines.append(f"| {kernel} | {len(on)} | sm_{arch} | {' | '.join(map(str, most))} of {SHARED[arch]} |")
    return "\n".join(lines) + "\n"


LAUNCHED = f"""{HEADING}

Whole engines run in the suite on a card that is not there (tests/rehearsal/), and each launch of theirs is compiled as it is,
with Triton's specialisations on types, alignment and ones, for A100, H100, B200 and RTX 5090 (sm_120), with what is launched on
each; what a test's RTX 4090 (sm_89) launches is compiled for it alone. The table has how many different signatures of a kernel
there are, and the most that one of them takes: registers, instructions that spill (none of them in a loop), and bytes of shared
memory, of those that a program can have there. It is written by `python -m tests.rehearsal.compile`, with the results by
signature in tests/rehearsal/compiled.json."""


def write_table() -> None:
    text = DOCUMENT.read_text()
    section = re.compile(rf"{HEADING}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    new = table(read().values())
    DOCUMENT.write_text(section.sub(lambda _: new + "\n", text) if section.search(text) else text.rstrip("\n") + "\n\n" + new)


def main(tests: list[str]) -> int:
    """Of the whole rehearsal, or of these tests; then what others have found stays."""
    path = FILE.with_suffix(".new")
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", *(tests or ["tests/rehearsal"])]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | {RENEW: str(path)}).returncode
    if not path.exists():
        return status or 1
    wanted = {key_of(signature, arch): (signature, arch) for signature, arch in launched(path)}
    path.unlink()
    known = read() if FILE.exists() else {}
    missing = [one for key, one in wanted.items() if key not in known]
    print(f"{len(wanted)} signatures, of which {len(missing)} are compiled", flush=True)
    if not tests:
        known = {key: one for key, one in known.items() if key in wanted}
    for i in range(0, len(missing), AT_ONCE):  # what is there when it is broken off is kept
        known |= {one.key: one for one in compile_anew(missing[i : i + AT_ONCE], WORKERS)}
        keep(known.values())
    keep(known.values())
    write_table()
    faults = [fault for one in read().values() for fault in one.faults()]
    print("\n".join(faults))
    return status or (1 if faults else 0)


def note(wanted: Iterable[tuple[Signature, int]]) -> bool:
    """Whether signatures are being gathered for `main`; then these are."""
    if path := os.environ.get(RENEW):
        with open(path, "a") as file:
            file.writelines(json.dumps((asdict(signature), arch)) + "\n" for signature, arch in wanted)
    return bool(path)


def launched(path: Path) -> Iterable[tuple[Signature, int]]:
    for line in path.read_text().splitlines():
        fields, arch = json.loads(line)
        pairs = {name: tuple(map(tuple, fields[name])) for name in ("types", "constants", "options")}
        yield Signature(**fields | pairs | {"aligned": tuple(fields["aligned"])}), arch


if __name__ == "__main__":
    sys.exit(_count_given() if "--from-stdin" in sys.argv else main(sys.argv[1:]))  # type: ignore[func-returns-value]
