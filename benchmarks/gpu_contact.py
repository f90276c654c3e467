"""The first contact with an NVIDIA GPU, in six minutes at most; `make gpu-contact ARGS="..."`. See docs/gpu_contact.md.

Parts in the order of their worth, each in a process of its own with a time limit: what is there, every kernel against its
definition, whole engines against the CPU (kernel by kernel, as graphs, overlapped, in other types, on two ranks), memory against
the plan, and the figures that matter as fractions of their floors. It needs torch and Triton, for engines also timm and what
transformers brings; no network. What is found is written at once, so a machine that is taken away has still told something, and a
second run passes over what passed, as long as files, card and versions are the same. The CPU's answers are computed once;
`--prepare` does so on a machine without a GPU, for a folder that is then taken along.

Without a GPU, `--rehearse` does the same in tiny sizes on a device that is not there (tests/rehearsal): values are real,
Triton is interpreted, and nothing is timed. The exit status is 0 when every part passed, 1 when one did not, 130 when it was
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # it runs from a checkout that is not installed
try:
    import msgspec  # noqa: F401
except ModuleNotFoundError:
    sys.path.append(str(ROOT / "benchmarks/contact/stand_ins"))

KEPT = ROOT / ".gpu-contact"
BUDGET_S = 360.0
REHEARSED = 5  # times as long may everything take when it is interpreted
INTERRUPTED = 130  # the exit status, as a shell's


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the parts with their limits, and end")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run these alone, and what is there")
    parser.add_argument("--again", nargs="+", default=[], metavar="PART", help="run these though they passed before, or 'all'")
    parser.add_argument("--budget-s", type=float, help=f"seconds for everything ({BUDGET_S:g})")
    parser.add_argument("--out", type=Path, help="folder for summary.json, rows.jsonl and log.txt; default: results in --kept")
    parser.add_argument(
        "--kept", type=Path, default=KEPT, help="folder for what later runs take again; default: .gpu-contact in the checkout"
    )
    parser.add_argument("--rehearse", action="store_true", help="no GPU: tiny sizes on a device that is not there")
    parser.add_argument("--prepare", action="store_true", help="no GPU: compute the CPU's answers into --kept, and end")
    args = parser.parse_args(argv)
    os.environ.setdefault("TRITON_CACHE_DIR", str(args.kept / "triton"))
    os.environ["TRITON_INTERPRET"] = "1" if args.rehearse else "0"  # what tests/ does to the environment leaves it so
    args.slowness = REHEARSED if args.rehearse else 1
    args.budget_s = args.budget_s or BUDGET_S * args.slowness
    args.out = args.out or args.kept / "results"
    return args


def load(parts: list[Any]) -> str:
    """What the parts' processes share; why some of it is not there."""
    missing = []
    modules = dict.fromkeys(part.module for part in parts)
    for name in ("torch", "triton", "timm", *modules, "vlserve.vision.internvit_tower", "vlserve.models.internvl"):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  (the parts that need it say so)
            missing.append(f"{name}: {type(error).__name__}: {error}")
    gc.collect()
    gc.freeze()  # forks do not copy what they only look at
    return "; ".join(missing)


class Contact:
    def __init__(self, args: argparse.Namespace, parts: list[Any]) -> None:
        from benchmarks.contact.record import Passed, Record, Result
        from benchmarks.contact.setting import REAL, TINY, Setting

        self.args, self.parts, self.begun = args, parts, time.monotonic()
        results = [Result(part=part.name, limit_s=part.limit_s * args.slowness) for part in parts]
        versions = {"torch": _version("torch"), "triton": _version("triton"), "python": sys.version.split()[0]}
        about = {"rehearsed": args.rehearse, "budget_s": args.budget_s, "stand_ins": _stand_ins(), **versions}
        self.record, self.passed = Record(args.out, results, about), Passed(args.kept / "passed")
        self._known = {**versions, "rehearsed": args.rehearse}
        self._setting = partial(
            Setting,
            kept=args.kept,
            rows=self.record.rows,
            log=self.record.log,
            is_rehearsed=args.rehearse,
            is_prepared_only=args.prepare,
            scale=TINY if args.rehearse else REAL,
        )

    def prepare(self) -> int:
        """The CPU's answers, without a limit."""
        from benchmarks.contact.isolated import PASSED, Job, run_jobs

        jobs = [Job(name=part.name, work=partial(_prepare, part.run, self._setting(part=part.name)), limit_s=math.inf)
                for part in self.parts if part.has_reference]  # fmt: skip
        outcomes = dict(run_jobs(jobs, self.record.log))
        for job, outcome in outcomes.items():
            print(f"{job.name}: {outcome.status}, {outcome.seconds:.1f} s {outcome.reason}".rstrip())
        print(f"{self.args.kept / 'references'} has the CPU's answers; {self.record.log} says more")
        return 0 if all(outcome.status == PASSED for outcome in outcomes.values()) else 1

    def run(self) -> int:
        """The exit status."""
        from benchmarks.contact.isolated import FAILED
        from benchmarks.contact.record import RUNNING

        result = None
        try:
            for part, result in zip(self.parts, self.record.results, strict=True):
                self._run_part(part, result)
                print(f"{part.name}: {result.status}, {result.seconds:.1f} s{': ' if result.reason else ''}{result.reason[:300]}")
                sys.stdout.flush()
                if part.name == "environment" and result.status == FAILED:
                    break  # there is no device
        except KeyboardInterrupt:
            assert result is not None
            if result.status == RUNNING:
                result.status, result.reason, result.rows = FAILED, "interrupted", self.record.rows_of(result.part)
            return self._end(INTERRUPTED)
        return self._end(0 if self.record.has_passed else 1)

    def _run_part(self, part: Any, result: Any) -> None:
        from benchmarks.contact.isolated import LATE, PASSED, Job, run_jobs
        from benchmarks.contact.record import RUNNING

        key = self._key(part)
        if part.sources and not {part.name, "all"} & {*self.args.again}:
            before = self.passed.find(part.name, key)
            if before is not None:
                result.status, result.seconds, result.rows = before.status, before.seconds, before.rows
                self.record.save()
                return
        left = self.args.budget_s - (time.monotonic() - self.begun)
        if left <= 0:
            result.status, result.reason = LATE, f"the budget of {self.args.budget_s:g} s was spent before it began"
            self.record.save()
            return
        result.status = RUNNING
        self.record.save()
        self.record.head(part.name)
        job = Job(name=part.name, work=partial(part.run, self._setting(part=part.name)), limit_s=min(result.limit_s, left))
        for _, outcome in run_jobs([job], self.record.log):
            result.status, result.seconds, result.reason = outcome.status, round(outcome.seconds, 1), outcome.reason
        result.rows = self.record.rows_of(part.name)
        if part.name == "environment":
            self._known |= {"card": next((row["card"] for row in result.rows if "card" in row), None)}
        if result.status == PASSED:
            self.passed.keep(result, key)
        self.record.save()

    def _key(self, part: Any) -> str:
        from benchmarks.contact.sources import digest_of

        known = json.dumps([part.name, sorted(self._known.items())])
        return hashlib.sha256((known + digest_of(part.sources)).encode()).hexdigest()

    def _end(self, status: int) -> int:
        self.record.save()
        print(f"\n{self.record.table()}\n{self.record.figures()}".rstrip())
        if self.args.rehearse:
            print("this was a rehearsal: no GPU was there, and nothing was timed")
        print(f"{time.monotonic() - self.begun:.0f} s; {self.record.summary}")
        return status


def _prepare(work: Any, setting: Any) -> None:
    from benchmarks.contact.setting import PreparedError

    with contextlib.suppress(PreparedError):
        work(setting)


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _stand_ins() -> list[str]:
    """Packages that were not there, and what is used of them is stood in for."""
    place = str(ROOT / "benchmarks/contact/stand_ins")
    return sorted(
        name for name, module in sys.modules.items() if "." not in name and place in str(getattr(module, "__file__", ""))
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from benchmarks.contact.parts import PARTS

    if args.list:
        for part in PARTS:
            print(f"{part.name:12}{part.limit_s:4d} s  {part.about}")
        print(f"{'together':12}{sum(part.limit_s for part in PARTS):4d} s, of a budget of {args.budget_s:g} s")
        return 0
    unknown = {*args.only, *args.again} - {part.name for part in PARTS} - {"all"}
    if unknown:
        sys.exit(f"there is no part {', '.join(sorted(unknown))}; --list names them")
    parts = [part for part in PARTS if not args.only or part.name in args.only or part.name == "environment"]
    missing = load(parts)
    if missing:
        print(f"not loaded: {missing}")
    signal.signal(signal.SIGTERM, _interrupt)
    contact = Contact(args, parts)
    return contact.prepare() if args.prepare else contact.run()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
