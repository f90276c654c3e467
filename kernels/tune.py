"""Fills launch.json for the GPU at hand: `python -m vlserve.kernels.tune`.

It holds how the products with 4-bit weights are launched, by architecture and class: up to 16, 32, 64 or 128 rows, and few or
many outputs. For each class every launch that could do, first the one in use, is checked against the definition in float64 and
timed, in bfloat16 with groups of 128, in shapes of InternVL3-8B and 38B; the one with the least geometric mean of times is kept.
These are some 3000 launches of 150 kernels; how much time is left is said on the way. Other architectures' tables are left
as they are, and a server reads the new one when it starts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vlserve.kernels.group_sums import group_sums
from vlserve.kernels.int4.reference import awq_matmul_ref
from vlserve.kernels.int4_pairs import PairedWeights, pack_for_gpu
from vlserve.kernels.int4_pairs.launch import CARD, ROWS, TABLE, Launch, device_of, launches_of, split
from vlserve.kernels.measure import Difference, Timer, by_outputs, difference
from vlserve.kernels.with_triton import runs_triton

TOLERANCE = Difference(4e-3, 0.03)  # rounding to bfloat16 once is 1.7e-3 and 0
GROUP = 128
SHAPES = {"narrow": ((4608, 3584), (3584, 18944)), "wide": ((37888, 3584), (55296, 5120))}  # outputs, inputs
SOME_ROWS = {16: (1, 16), 32: (32,), 64: (64,), 128: (128,)}  # of each class
BLOCK_T, BLOCK_N, WARPS, STAGES, WAVES, REGISTERS = (
    (16, 32, 64),
    (64, 128),
    (2, 4, 8),
    (2, 3, 4, 5),
    (1, 2, 4, 8),
    (None, 144, 192),
)
SHARED = 99 * 1024  # bytes that a program may have on every architecture from 8.0 on
SAY_EVERY_S = 5.0


class RefusedError(Exception):
    """A launch that does not compile, does not fit the device, or gives a wrong result."""


@dataclass(frozen=True, slots=True)
class Problem:
    rows: int
    outputs: int
    inputs: int


Measure = Callable[[Problem, Launch, int], float]  # seconds with the inputs in so many parts; raises RefusedError
Say = Callable[[str], None]


def candidates(rows: int, shared: int = SHARED) -> list[Launch]:
    """For a class of so many rows, on a device with so many bytes of shared memory a program."""
    found = []
    for block_t, block_n, warps, stages, registers, waves in product(BLOCK_T, BLOCK_N, WARPS, STAGES, REGISTERS, WAVES):
        sums = block_t * block_n / (32 * warps)  # float32 numbers of a thread, twice: of a group and of all
        fits = 4 <= sums <= 64 and stages * (64 * block_n + 256 * block_t) <= shared
        if fits and rows / 4 <= block_t <= rows and (registers is None or warps < 8):
            found.append(Launch(block_t=block_t, block_n=block_n, warps=warps, stages=stages, waves=waves, registers=registers))
    return found


def problems(rows: int, width: str) -> list[Problem]:
    """What a class is timed in."""
    return [Problem(some, *shape) for some in SOME_ROWS[rows] for shape in SHAPES[width]]


def tune(
    measure: Measure,
    multiprocessors: int,
    *,
    in_use: dict[str, Launch],
    shared: int = SHARED,
    is_over: Callable[[], bool] = lambda: False,
    say: Say = print,
) -> dict[str, Launch]:
    """The fastest launch of each class, where that `in_use` is tried first; raises RuntimeError where all were refused.

    Once `is_over` no further launch is tried, and classes of which none could be used so far are left out.
    """
    measured: dict[tuple[Problem, Launch, int], float | RefusedError] = {}

    def seconds(problem: Problem, launch: Launch) -> float:
        programs = -(-problem.outputs // launch.block_n) * -(-problem.rows // launch.block_t)
        parts = split(launch, programs, -(-problem.inputs // GROUP), multiprocessors)
        key = problem, replace(launch, waves=0), parts  # two launches that differ in `waves` may do the same
        if key not in measured:
            try:
                measured[key] = measure(problem, launch, parts)
            except RefusedError as error:
                measured[key] = error
        found = measured[key]
        if isinstance(found, RefusedError):
            raise found
        return found

    classes = {(rows, width): candidates(rows, shared) for rows in ROWS for width in SHAPES}
    progress = Progress(sum(len(launches) for launches in classes.values()), say)
    found = {}
    for (rows, width), launches in classes.items():
        name = f"{rows} {width}"
        launches.sort(key=lambda launch: launch != in_use[name])
        found[name] = _fastest(name, problems(rows, width), launches, seconds, progress, is_over)
    return {name: launch for name, launch in found.items() if launch}


def _fastest(
    name: str,
    timed_in: list[Problem],
    launches: list[Launch],
    seconds: Callable[[Problem, Launch], float],
    progress: Progress,
    is_over: Callable[[], bool],
) -> Launch | None:
    best, chosen, reasons = math.inf, None, set()
    for launch in launches:
        if is_over():
            break
        try:
            logs = [math.log(seconds(problem, launch)) for problem in timed_in]
        except RefusedError as error:
            reasons.add(str(error))
        else:
            mean = math.exp(sum(logs) / len(logs))
            if mean < best:
                best, chosen = mean, launch
        progress.step(f"{name}: best {1e6 * best:.1f} us" if chosen else f"{name}: none yet")
    if chosen is None and not is_over():
        raise RuntimeError(f"class {name!r}: none of {len(launches)} launches can be used: {'; '.join(sorted(reasons)[:3])}")
    progress.say(f"{name}: {chosen}, {1e6 * best:.1f} us; {len(reasons)} kinds of refusals" if chosen else f"{name}: not reached")
    return chosen


class Progress:
    """Says from time to time how far it is, and how much time is left."""

    def __init__(self, total: int, say: Say) -> None:
        self.say, self._total, self._done = say, total, 0
        self._begun = self._said = time.monotonic()

    def step(self, what: str) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._said >= SAY_EVERY_S:
            self._said = now
            left = (now - self._begun) / self._done * (self._total - self._done)
            self.say(f"[{self._done} of {self._total}, about {left / 60:.0f} min left] {what}")


def write_table(path: Path, architecture: str, card: str, found: dict[str, Launch]) -> None:
    """The table in `path`, or launch.json where there is no such file yet, with this architecture's launches."""
    table: dict[str, Any] = json.loads((path if path.exists() else TABLE).read_text())
    launches = {
        name: {key: value for key, value in asdict(launch).items() if value is not None} for name, launch in found.items()
    }
    table[architecture] = {CARD: card, **launches}
    path.write_text(formatted(table))


def formatted(table: dict[str, Any]) -> str:
    """As JSON with a line a class."""
    parts = []
    for architecture, classes in table.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(fields)}" for name, fields in classes.items()]
        parts.append(f"  {json.dumps(architecture)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


class OnDevice:
    """Measures on a CUDA device; weights and results of a problem are made once."""

    def __init__(self, device: torch.device, *, runs: int = 20) -> None:
        self.device, self.timer = device, Timer(device, runs=runs)
        self.weights = cache(self._weights)
        self.data = cache(self._data)

    def __call__(self, problem: Problem, launch: Launch, parts: int) -> float:
        from triton.errors import TritonError

        from vlserve.kernels.int4_pairs.triton import multiply

        x, sums, packed, want = self.data(problem)
        try:
            got = multiply(x, packed, sums, launch, parts)
            torch.cuda.synchronize(self.device)
        except (TritonError, RuntimeError) as error:
            raise RefusedError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
        found = difference(got, want)
        if not found.within(TOLERANCE):
            raise RefusedError(f"the result is wrong: {found}")
        return self.timer(lambda: multiply(x, packed, sums, launch, parts))

    def _weights(self, outputs: int, inputs: int) -> tuple[tuple[torch.Tensor, ...], PairedWeights]:
        generator = torch.Generator(self.device).manual_seed(0)
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=self.device, generator=generator)
        shape = (outputs, inputs // GROUP)
        scales = (torch.rand(shape, device=self.device, generator=generator) / 100 + 0.001).bfloat16()
        zeros = torch.randint(0, 16, shape, dtype=torch.uint8, device=self.device, generator=generator)
        return (codes, scales, zeros), pack_for_gpu(codes, scales, zeros)

    def _data(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor, PairedWeights, torch.Tensor]:
        given, packed = self.weights(problem.outputs, problem.inputs)
        x = torch.randn(problem.rows, problem.inputs, device=self.device).bfloat16()
        wide = x.double()
        sums = group_sums(x, packed.empty_sums(x))
        return x, sums, packed, by_outputs(lambda *parts: awq_matmul_ref(wide, *parts), *given)


def _compiles(device: torch.device, launch: Launch) -> bool:
    """Whether it compiles and fits the device, tried with a small product."""
    from triton.errors import TritonError

    from vlserve.kernels.int4_pairs.triton import multiply

    codes = torch.zeros(launch.block_n, GROUP, dtype=torch.uint8, device=device)
    scales = torch.ones(launch.block_n, 2, dtype=torch.bfloat16, device=device)
    x = torch.ones(launch.block_t, 2 * GROUP, dtype=torch.bfloat16, device=device)
    packed = pack_for_gpu(codes, scales, torch.zeros_like(scales, dtype=torch.uint8))
    try:
        multiply(x, packed, group_sums(x, packed.empty_sums(x)), launch, 1)
        torch.cuda.synchronize(device)
    except TritonError:
        return False
    return True


def list_candidates(device: torch.device | None, say: Say = print) -> None:
    """What `tune` would try, and on a GPU how much of it compiles."""
    shared = _shared(device) if device else SHARED
    for rows in ROWS:
        found = candidates(rows, shared)
        say(f"{rows} rows, narrow and wide: {len(found)} launches")
        for launch in found:
            say(f"  {launch}")
        if device is not None:
            kernels = {replace(launch, waves=0) for launch in found}
            say(f"  {sum(_compiles(device, launch) for launch in kernels)} of {len(kernels)} kernels compile")
    if device is None:
        say(f"there is no CUDA device here: nothing was compiled; {SHARED // 1024} KiB of shared memory were assumed")


def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="vlserve.kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to fill; by default the one that is used")
    parser.add_argument("--runs", type=int, default=20, help="of each timing, whose median counts (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after so many begin nothing new, and write what was found (no limit)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the launches that would be timed, and how many compile")
    args = parser.parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    if args.dry_run:
        list_candidates(device)
        return
    if device is None or not runs_triton(torch.empty(0, device=device)):
        parser.error("this times kernels and needs a CUDA device and Triton; --dry-run lists what it would time")
    architecture, multiprocessors = device_of(device.index)
    card = torch.cuda.get_device_name(device)
    print(f"{card}, {architecture}, {multiprocessors} multiprocessors")
    in_use, deadline = launches_of(architecture), time.monotonic() + args.seconds
    found = tune(
        OnDevice(device, runs=args.runs),
        multiprocessors,
        in_use=in_use,
        shared=_shared(device),
        is_over=lambda: time.monotonic() >= deadline,
    )
    if not found:
        parser.error(f"no launch could be timed within {args.seconds:g} seconds; nothing was written")
    left = [name for name in in_use if name not in found]
    card += f", all but {', '.join(left)}" if left else ""
    write_table(args.out, architecture, card, in_use | found)
    print(f"{args.out}: {architecture} is timed on {card}")


if __name__ == "__main__":
    main()
