"""Checks and times the cases. A speed whose check failed is not given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.attention import attention_cases
from benchmarks.gpu.cards import CARDS, floor
from benchmarks.gpu.case import Built, Case, Run
from benchmarks.gpu.elementwise import elementwise_cases
from benchmarks.gpu.experts import expert_product_cases
from benchmarks.gpu.heads import head_cases
from benchmarks.gpu.products import product_cases
from benchmarks.gpu.sizes import Sizes
from vlserve.kernels.measure import Timer

try:
    from triton.errors import TritonError
except ImportError:  # then there are torch's operators only
    TritonError = RuntimeError
# what a kernel, or a package that was never tried here, may raise
ERRORS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, OSError, TritonError)
COPIED, PRODUCT = 2**30, 8192  # bytes; width of a square matrix

Seconds = Callable[[Run], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured on this device: bytes a second of a copy, reads and writes, and operations a second of a bfloat16 product."""

    bandwidth: float
    rate: float


@dataclass(slots=True)
class Report:
    """What was found; `say` prints a line."""

    say: Callable[[str], None] = print
    kernels: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    def once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def fail(self, name: str, reason: str) -> None:
        self.failed.append(f"{name}: {reason}")
        self.say(f"check failed: {name}: {reason}")

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{name}: {reason}")
        self.once(f"not measured: {reason} (first: {name})" if "time is up" in reason else f"not measured: {name}: {reason}")


def all_cases(models: list[Sizes], *, quick: bool = False) -> Iterator[Case]:
    for sizes in models:
        for make in (product_cases, head_cases, attention_cases, elementwise_cases):
            yield from make(sizes, quick=quick)
    yield from expert_product_cases(quick=quick)


def measure_rates(timer: Timer, copied: int = COPIED, width: int = PRODUCT) -> Rates:
    """Of the device at hand."""
    source = torch.empty(copied, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    x = torch.randn(width, width, device=timer.device).bfloat16()
    return Rates(
        bandwidth=2 * copied / timer(lambda: target.copy_(source)),
        rate=2 * width**3 / timer(lambda: F.linear(x, x)),
    )


def run_cases(cases: list[Case], device: torch.device, seconds: Seconds, rates: Rates, report: Report, deadline: float) -> None:
    """Until `deadline`, of time.monotonic."""
    for case in cases:
        if time.monotonic() > deadline:
            report.skip(case.name, "the kernels' time is up, see --seconds")
            continue
        try:
            measure_case(case, device, seconds, rates, report)
        except torch.OutOfMemoryError:
            report.skip(case.name, "not enough memory")
        except ERRORS as error:
            report.fail(case.name, f"{type(error).__name__}: {first_line(error)}")


def measure_case(case: Case, device: torch.device, seconds: Seconds, rates: Rates, report: Report) -> None:
    built = case.build(device)
    found = built.difference()
    if not found.within(case.tolerance):
        report.fail(case.name, f"{found} from the definition in float64; tolerated are {case.tolerance}")
        return
    took = seconds(built.run)
    least, work = floor(case.work, rates.bandwidth, rates.rate), case.work
    limit = "memory" if work.bytes / rates.bandwidth >= work.flops / rates.rate else "arithmetic"
    row: dict[str, Any] = {
        "model": case.model,
        "kernel": case.kernel,
        "shape": case.shape,
        "error": found.relative,
        "microseconds": 1e6 * took,
        "share_of_limit": least / took,
        "limit": limit,
        "bytes": work.bytes,
        "flops": work.flops,
        "times_as_fast": {name: other / took for name, other in rival_times(case, built, seconds, report)},
    }
    report.kernels.append(row)
    ratios = "  ".join(f"{ratio:.2f}x {name}" for name, ratio in row["times_as_fast"].items())
    report.say(f"{case.name:72}{1e6 * took:10.1f} us {least / took:6.0%} of {limit:11}{ratios}")


def rival_times(case: Case, built: Built, seconds: Seconds, report: Report) -> Iterator[tuple[str, float]]:
    """Of those that can be had and are right."""
    for make in built.rivals():
        try:
            rival = make()
            found = built.difference(rival)
            if found.within(case.tolerance):
                yield rival.name, seconds(rival.run)
            else:
                report.once(f"not compared with {rival.name} in {case.kernel}: its result is off: {found}")
        except torch.OutOfMemoryError:
            report.once(f"{case.name}: not enough memory for a comparison")
        except ImportError as error:
            report.once(f"not compared: {first_line(error)}")
        except ERRORS as error:
            report.once(f"not compared in {case.kernel}: {type(error).__name__}: {first_line(error)}")


def plan_cases(cases: list[Case], report: Report) -> None:
    """Without a GPU: inputs are built, launches planned, floors and estimates printed; nothing runs."""
    for case in cases:
        device = case.dry_device
        case.build(device)
        row: dict[str, Any] = {
            "model": case.model,
            "kernel": case.kernel,
            "shape": case.shape,
            "bytes": case.work.bytes,
            "flops": case.work.flops,
            "built_on": device.type,
            "cards": {},
        }
        texts = []
        for card in CARDS.values():
            found = case.predict(card)
            least = card.floor(case.work)
            launch = case.plan(card.arch, card.multiprocessors)
            row["cards"][card.name] = {
                "floor_us": 1e6 * least,
                "estimate_us": 1e6 * found.seconds,
                "reason": found.reason,
                "kernels": found.kernels,
                "launch": launch,
            }
            texts.append(f"{card.name} {1e6 * least:.1f} -> {1e6 * found.seconds:.1f} ({found.reason})")
        report.kernels.append(row)
        report.say(f"{case.name:72} {device.type:4}  {case.work.bytes / 1e6:8.1f} MB {case.work.flops / 1e9:9.2f} GFLOP")
        report.say(f"    us at least -> estimate: {', '.join(texts)}")
        report.say(f"    on H100: {row['cards']['H100']['launch']}")


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else ""
