"""Checks and times every kernel, then whole models, on one NVIDIA GPU; `make bench-gpu ARGS="..."`.

Each kernel is compared with its definition in float64 first, and one that is off gets no figure. Times are medians by CUDA events
with the L2 cache overwritten between runs, beside what a copy and a product reach on the same card, and beside torch's and other
packages' kernels. It needs torch, Triton and timm; transformers, FlashInfer, gemlite, marlin and matplotlib are used
where they are. Without a GPU, `--dry-run` builds the inputs, plans the launches and prints what each must take at least on named
cards, and what it should take by arithmetic. At the end stand the targets, and which are met. The last line is one JSON document;
the exit status is 1 when a check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from a checkout that is not installed

try:
    import torch
except ModuleNotFoundError:
    sys.exit("this needs torch, which is not here; on a machine that may install it: make .venv/.ready, then again")

from benchmarks.gpu.attention import attention
from benchmarks.gpu.cards import CARDS, SOURCES
from benchmarks.gpu.case import Case
from benchmarks.gpu.elementwise import gate, norm, rotary
from benchmarks.gpu.experts import TINY_MIXTURE, expert_product
from benchmarks.gpu.heads import head, int8_head
from benchmarks.gpu.kernels import ERRORS, Rates, Report, all_cases, first_line, measure_rates, plan_cases, run_cases
from benchmarks.gpu.predict import ASSUMED
from benchmarks.gpu.products import product, spread_out
from benchmarks.gpu.report import machine, plot
from benchmarks.gpu.sampling import drawing, greedy
from benchmarks.gpu.sizes import KINDS, MODELS, TINY, Sizes
from benchmarks.gpu.steps import BATCHES, plan_steps
from benchmarks.gpu.target_report import judge_targets, plan_targets
from benchmarks.gpu.targets import target_cases
from benchmarks.gpu.vision import encoder_norm
from benchmarks.gpu.whole import needed_bytes, plan_models, rehearse, run_models
from vlserve.kernels.measure import Timer
from vlserve.kernels.with_triton import runs_triton

SHARE = 0.55  # of the time, for kernels


def wanted_cases(models: list[Sizes], *, quick: bool) -> list[Case]:
    """Those with targets first, so that they are measured even if time ends."""
    return list({case.name: case for case in (*target_cases(), *all_cases(models, quick=quick))}.values())


def small_cases() -> list[Case]:
    """One of each kind, small enough for the CPU's own implementations."""
    cases = [product("tiny", "256 x 256", 256, 256, rows) for rows in (3, 40, 200)]
    cases += [spread_out("tiny", "256 x 256", 256, 256), int8_head("tiny", 300, 64, 3), head("tiny", 300, 64, 3)]
    cases += [expert_product(TINY_MIXTURE, form, 5) for form in TINY_MIXTURE.forms]
    cases += [greedy("tiny", 300, 3), drawing("tiny", 300, 3), encoder_norm(TINY, 2)]
    for kind in KINDS:
        cases += [attention(TINY, 2, 1, 70, kind), attention(TINY, 1, 20, 50, kind), rotary(TINY, 5, kind)]
    return cases + [norm(TINY, 5, adds=False), norm(TINY, 5, adds=True), gate(TINY, 5)]


def dry_run(args: argparse.Namespace, report: Report) -> None:
    """All that a CPU can do. Nothing is timed."""
    print(SOURCES)
    print(ASSUMED)
    models = list(MODELS.values())
    plan_cases(wanted_cases(models, quick=args.quick), report)
    plan_models(models, report)
    for case in small_cases():
        found = case.build(torch.device("cpu")).difference()
        if found.within(case.tolerance):
            print(f"the CPU's own implementation is right: {case.kernel}, {case.shape}: {found}")
        else:
            report.fail(case.name, str(found))
    rehearse(report)
    on = [row["built_on"] for row in report.kernels]
    plan_steps(MODELS["8b"], report)
    plan_targets(report)
    print(f"inputs of {on.count('cpu')} cases were built on the CPU, of {on.count('meta')} on torch's meta device for their size")
    print("nothing was timed: this was a dry run, and every time above is arithmetic")


def choose_model(device: torch.device) -> str:
    """8b, or 1b where that does not fit with either weights."""
    free = torch.cuda.mem_get_info(device)[0]
    return "8b" if free > needed_bytes(MODELS["8b"], "awq", 8) else "1b"


def run(args: argparse.Namespace, device: torch.device, report: Report) -> Rates:
    begun = time.monotonic()
    timer = Timer(device)
    rates = measure_rates(timer)
    print(f"{torch.cuda.get_device_name(device)}: a copy moves {rates.bandwidth / 1e12:.2f} TB/s, a product of bfloat16 does")
    print(f"{rates.rate / 1e12:.0f} TFLOP/s; shares below are of these")
    name = args.model or choose_model(device)
    models = [MODELS[name]] if args.quick else list(MODELS.values())
    torch.manual_seed(0)
    with torch.inference_mode():
        run_cases(wanted_cases(models, quick=args.quick), device, timer, rates, report, begun + SHARE * args.seconds)
    batches = BATCHES[:2] if args.quick else BATCHES
    run_models(MODELS[name], device, rates, report, begun + args.seconds, batches=batches)
    judge_targets(report, rates, torch.cuda.get_device_name(device))
    return rates


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), help="whole model to time; default: 8b, or 1b where memory is short")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and batches, of that model alone")
    parser.add_argument("--seconds", type=float, default=420, help="after which nothing new is begun; default: 420")
    parser.add_argument("--dry-run", action="store_true", help="no GPU: build, plan, and print floors; nothing is timed")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a roofline; needs matplotlib")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="save the results there as well")
    args = parser.parse_args(argv)
    if not args.dry_run and not (torch.cuda.is_available() and runs_triton(torch.empty(0, device="cuda"))):
        parser.error("this times kernels and needs a CUDA device and Triton; --dry-run does what can be done without")
    return args


def main(argv: list[str] | None = None) -> int:
    args, report = parse(argv), Report()
    device = None if args.dry_run else torch.device("cuda", torch.cuda.current_device())
    rates = None
    if device is None:
        dry_run(args, report)
    else:
        rates = run(args, device, report)
    result: dict[str, Any] = {"timed": device is not None, "machine": machine(device)}
    result |= {"bandwidth": rates.bandwidth, "rate": rates.rate} if rates else {"cards": list(CARDS), "sources": SOURCES}
    result |= {name: getattr(report, name) for name in ("kernels", "models", "steps", "targets", "failed", "skipped")}
    if args.plot:
        try:
            plot(args.plot, report, rates)
        except ERRORS as error:
            print(f"no plot: {type(error).__name__}: {first_line(error)}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if report.failed:
        print(f"{len(report.failed)} checks failed")
    print(json.dumps(result))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
