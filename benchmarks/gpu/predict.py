"""How long kernels should take on a named card, by arithmetic. Nothing of this was ever timed.

What is assumed, of all cards alike; a kernel's time is that of its start, of its waits, and of its slowest resource:
* A kernel of a CUDA graph begins 1 us after the one that it depends on has ended.
* Reads that follow from one another, and the last write, take 0.5 us each before and after the main loop.
* Memory gives 90 % of the data sheet's bandwidth, which a device-to-device copy on an H200 is known to reach (4.3 of 4.8 TB/s),
  but never more than what the resident programs have asked for ahead each 0.8 us (Little's law). Programs go in rounds of as many
  as fit by registers, shared memory and threads, and the last round may be too small to draw all.
* L2 gives a multiprocessor 32 bytes a cycle, half of what its port is wide.
* 75 % of the cycles issue an instruction, of those counted in docs/kernels.md, and tensor cores do 60 % of the data sheet's rate.
  The multiprocessor with the most programs is the last to end.
* All of these overlap, but tensor cores and other instructions only where several programs are resident: one by itself
  multiplies and then computes. (A Triton attention on an H100 is published at 323 TFLOP/s, causal, 2048 tokens of 128 channels:
  arXiv 2407.08608; with this rule ours comes out near that, without it far above.)
* A library's kernel, as torch's product, has no grid here: it is taken to be spread evenly and to reach those rates.

So a time is made of "launches", "waits", one or two of "memory", "L2", "tensor cores" and "instructions", and of what a grid that
does not fit adds: "too few programs" for the card, a "last round" of few, or "reads too small" of too many short programs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.gpu.cards import Card
from benchmarks.gpu.counted import Counted

LAUNCH_S = 1e-6
WAIT_S = 0.5e-6
LATENCY_S = 0.8e-6  # of a read when memory is busy
ATTAINABLE = 4.3 / 4.8
L2_BYTES = 32  # a cycle and multiprocessor
ISSUED = 0.75
TENSOR_CORES = 0.6
LANES = 128  # threads' instructions that a multiprocessor issues a cycle
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory beside a program's own
ASSUMED = (
    f"estimates, none of which was timed: {1e6 * LAUNCH_S:g} us to start a kernel in a graph, {1e6 * WAIT_S:g} us a dependent "
    f"read, {ATTAINABLE:.0%} of the bandwidth if enough is asked for {1e6 * LATENCY_S:g} us ahead, {L2_BYTES} bytes a cycle from "
    f"L2, {ISSUED:.0%} of the instructions, {TENSOR_CORES:.0%} of the rate: see benchmarks/gpu/predict.py"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """`programs` of `warps` warps share a kernel's work alike; each asks for `ahead` bytes of memory before it waits."""

    programs: int
    ahead: float
    warps: int
    counted: Counted
    longest_first: bool = False  # programs differ, and the short ones come last, so that no round is left half empty

    def resident(self, card: Card) -> int:
        """Programs that a multiprocessor holds at once, at most."""
        registers = -(-self.counted.registers // 8) * 8 * 32 * self.warps
        by_shared = card.shared // (self.counted.shared + RESERVED)
        return max(1, min(REGISTERS // registers, by_shared, THREADS // (32 * self.warps), PROGRAMS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One launch: `bytes` between memory and chip, `through_l2` between L2 and programs, `instructions` of all threads."""

    bytes: float
    flops: float = 0
    instructions: float = 0
    through_l2: float = 0
    waits: int = 2
    grid: Grid | None = None  # None: a library's


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds by what they are spent on, and the kernels that take them."""

    parts: dict[str, float] = field(default_factory=dict)
    kernels: int = 0

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def reason(self) -> str:
        """What most of it is spent on."""
        return self.largest(0.0)[0]

    def largest(self, share: float) -> list[str]:
        """What at least such a share of it is spent on, the most first."""
        names = [name for name, seconds in self.parts.items() if seconds >= share * self.seconds]
        return sorted(names, key=lambda name: -self.parts[name])

    def __add__(self, other: Prediction) -> Prediction:
        names = dict.fromkeys((*self.parts, *other.parts))
        parts = {name: self.parts.get(name, 0.0) + other.parts.get(name, 0.0) for name in names}
        return Prediction(parts, self.kernels + other.kernels)

    def times(self, count: int) -> Prediction:
        return Prediction({name: count * seconds for name, seconds in self.parts.items()}, count * self.kernels)

    def __str__(self) -> str:
        """The parts from 5 % on, in microseconds."""
        return ", ".join(f"{name} {1e6 * self.parts[name]:.1f}" for name in self.largest(0.05))


def predict(kernels: Iterable[Kernel], card: Card) -> Prediction:
    """Of kernels that run one after the other."""
    total = Prediction()
    for kernel in kernels:
        total += _predict(kernel, card)
    return total


def _predict(kernel: Kernel, card: Card) -> Prediction:
    cycles = card.multiprocessors * card.clock  # of all multiprocessors, a second
    tensor_cores = kernel.flops / (TENSOR_CORES * card.rate)
    instructions = kernel.instructions / (ISSUED * LANES * cycles)
    if kernel.grid and kernel.grid.resident(card) == 1:
        computing = {"tensor cores": tensor_cores, "instructions": instructions}
    elif tensor_cores >= instructions:
        computing = {"tensor cores": tensor_cores}
    else:
        computing = {"instructions": instructions}
    memory = kernel.bytes / (ATTAINABLE * card.bandwidth)
    slack = _slack(kernel.grid, card)
    limits = [  # (seconds on a grid that fits, by cause; seconds)
        ({"memory": memory}, _memory(kernel, card)),
        ({"L2": kernel.through_l2 / (L2_BYTES * cycles)}, slack * kernel.through_l2 / (L2_BYTES * cycles)),
        (computing, slack * sum(computing.values())),
    ]
    ideal, took = max(limits, key=lambda limit: limit[1])
    parts = {"launches": LAUNCH_S, "waits": WAIT_S * kernel.waits, **ideal}
    uneven = took - sum(ideal.values())
    if uneven > 0:
        parts[_cause(kernel, card)] = uneven
    return Prediction(parts, 1)


def _slack(grid: Grid | None, card: Card) -> float:
    """The most programs of a multiprocessor over the mean."""
    if grid is None or (grid.longest_first and grid.programs >= card.multiprocessors):
        return 1.0
    return -(-grid.programs // card.multiprocessors) * card.multiprocessors / grid.programs


def _memory(kernel: Kernel, card: Card) -> float:
    """Seconds of the rounds, each at the bandwidth that its programs draw."""
    most = ATTAINABLE * card.bandwidth
    if kernel.grid is None:
        return kernel.bytes / most
    grid, slots = kernel.grid, kernel.grid.resident(card) * card.multiprocessors
    each = kernel.bytes / grid.programs
    latency = LATENCY_S * each / grid.ahead  # of a program, and of a round if that is all
    rounds = [slots] * (grid.programs // slots) + [grid.programs % slots] * (grid.programs % slots > 0)
    seconds = sum(max(programs * each / most, latency) for programs in rounds)
    return max(kernel.bytes / most, seconds - LATENCY_S)  # the first read is among the waits


def _cause(kernel: Kernel, card: Card) -> str:
    """Why a grid takes longer than the same work spread evenly."""
    assert kernel.grid is not None, "a library's kernel is spread evenly"
    grid, slots = kernel.grid, kernel.grid.resident(card) * card.multiprocessors
    if grid.programs <= slots:
        return "too few programs"
    in_flight = slots * min(grid.ahead, kernel.bytes / grid.programs)
    return "last round" if in_flight >= LATENCY_S * ATTAINABLE * card.bandwidth else "reads too small"
