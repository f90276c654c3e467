"""The GPU benchmark as far as a CPU goes: floors and times by hand, a whole dry run, and that a wrong result gets no speed.

Its targets: test_gpu_targets.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.cards import CARDS
from benchmarks.gpu.case import Built, Case, Rival
from benchmarks.gpu.counted import Counted, counted
from benchmarks.gpu.elementwise import gate_with_sums, norm_with_sums
from benchmarks.gpu.kernels import Rates, Report, run_cases
from benchmarks.gpu.predict import Grid, Kernel, predict
from benchmarks.gpu.products import machine_code, product
from benchmarks.gpu.sizes import MODELS, Sizes
from tests.kernels.cases import PER_WEIGHT
from vlserve.kernels.int4_pairs.launch import fitted, launches
from vlserve.kernels.measure import difference

ROOT = Path(__file__).parents[2]
# what only the front, the engine's messages or comparisons need
MISSING = (
    "zmq",
    "fastapi",
    "msgspec",
    "uvicorn",
    "transformers",
    "tokenizers",
    "safetensors",
    "flashinfer",
    "gemlite",
    "marlin",
    "matplotlib",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dry() -> list[str]:
    """What a dry run prints where there is nothing but the engine's side."""
    code = f"import sys; sys.modules.update(dict.fromkeys({MISSING})); sys.argv = ['x', '--dry-run', '--quick']; import runpy; "
    code += "runpy.run_path('benchmarks/bench_gpu.py', run_name='__main__')"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()


def test_a_dry_run_says_what_it_is_and_ends_in_json(dry: list[str]) -> None:
    assert any(line.startswith("nothing was timed") for line in dry)
    result = json.loads(dry[-1])
    assert result["timed"] is False and not result["failed"]
    assert {row["model"] for row in result["kernels"]} == {*MODELS, "square", "30b-a3b", "gpt-oss-20b"}
    assert {row["model"] for row in result["models"]} == set(MODELS)
    kinds = {row["kernel"].split(",")[0] for row in result["kernels"]}
    assert kinds == {
        *("AWQ product", "AWQ", "AWQ dequantise", "int8 head", "head", "greedy sampling", "sampling with top-k"),
        *("attention decode", "attention prefill", "experts' product"),
        *("rms_norm", "add_rms_norm", "silu_mul", "rotary_store", "add_scaled_norm"),
    }
    for row in result["kernels"]:
        assert set(row["cards"]) == set(CARDS) and row["built_on"] in ("cpu", "meta")
        assert all(0 < card["floor_us"] < card["estimate_us"] and card["launch"] for card in row["cards"].values())
    assert not any("microseconds" in row for row in result["kernels"]), "a time that nobody took"


def test_floors_of_an_8b_decode_step_by_hand(dry: list[str]) -> None:
    per_layer = 4608 * 3584 + 3584 * 3584 + 37888 * 3584 + 3584 * 18944
    assert per_layer == 233_046_016
    layers = 28 * per_layer // 2 + 28 * per_layer // 128 * 3  # codes; 16-bit scales and 8-bit zero points
    head, norms, biases = 151_674 * 3584 * 2, 57 * 3584 * 2, 28 * 4608 * 2
    context = 1024 * 28 * 2 * 4 * 128 * 2
    assert MODELS["8b"].step_bytes("awq") == layers + head + norms + biases == 4_503_446_528
    assert MODELS["8b"].decode("awq", 1, 1024).bytes == 4_503_446_528 + context == 4_562_166_784
    rows = [row for row in json.loads(dry[-1])["models"] if row["model"] == "8b" and row.get("weights") == "awq"]
    row = next(row for row in rows if row["what"] == "decode, batch 1, context 1024")
    assert row["floor_ms"]["H200"] == pytest.approx(4_562_166_784 / 4.8e12 * 1e3)
    assert any(line.startswith("8b awq  decode, batch 1") and "H200 0.950 ms" in line for line in dry)


def test_other_work_by_hand() -> None:
    assert MODELS["1b"].weights == 24 * (1152 * 896 + 896 * 896 + 9728 * 896 + 896 * 4864)
    assert MODELS["38b"].weights == 64 * (7168 * 5120 + 5120 * 5120 + 55296 * 5120 + 5120 * 27648)
    assert MODELS["8b"].prefill("bf16", 1, 2).flops == 2 * (2 * 28 * 233_046_016 + 151_674 * 3584) + 4 * 3 * 28 * 128 * 28
    case = product("8b", "qkv_proj", 4608, 3584, 16)
    assert case.work.bytes == 4608 * 3584 // 2 + 4608 * 28 * 3 + 2 * 16 * (4608 + 3584)
    o_proj = product("8b", "o_proj 3584 x 3584", 3584, 3584, 16)
    assert [len(each.kernels(CARDS["H100"])) for each in (case, o_proj)] == [2, 3], "one kernel adds up the parts"


def grid(programs: int, *, ahead: int = 2**20, registers: int = 32, longest_first: bool = False) -> Grid:
    return Grid(programs=programs, ahead=ahead, warps=4, counted=Counted(registers, 1024, 0.0), longest_first=longest_first)


def test_predicted_times_by_hand() -> None:
    h200, b200 = CARDS["H200"], CARDS["B200"]
    found = predict([Kernel(bytes=4_300_000_000)], h200)  # a millisecond of a copy's bandwidth
    assert found.reason == "memory" and found.seconds == pytest.approx(1e-3 + 1e-6 + 2 * 0.5e-6)
    few, many = (predict([Kernel(bytes=0, instructions=count)], b200) for count in (1e6, 1e12))
    assert few.reason == "launches" and many.reason == "instructions"
    assert many.seconds == pytest.approx(2e-6 + 1e12 / (0.75 * 128 * 148 * (2250e12 / 148 / 8192)))
    both = found + few.times(3)
    assert both.kernels == 4 and both.seconds == pytest.approx(found.seconds + 3 * few.seconds)
    assert found.largest(0.5) == ["memory"] and str(found) == "memory 1000.0"


def test_too_few_programs_draw_less_than_the_bandwidth() -> None:
    """Ten programs that ask for 8 KB ahead: 100 KB a 0.8 us each, but the first read is a wait as any kernel has."""
    card, kernel = CARDS["H100"], Kernel(bytes=8_192_000, grid=grid(10, ahead=8192))
    found = predict([kernel], card)
    assert found.seconds == pytest.approx(2e-6 + (100 - 1) * 0.8e-6) and found.reason == "too few programs"
    assert predict([replace(kernel, grid=grid(1000, ahead=8192))], card).reason == "memory"
    small = predict([Kernel(bytes=2_000_000, grid=grid(100_000, ahead=20))], card)
    assert small.reason == "reads too small"


def test_the_multiprocessor_with_the_most_programs_ends_last() -> None:
    card, work = CARDS["H100"], 1e12
    even, uneven, graded = (
        predict([Kernel(bytes=0, instructions=work, grid=each)], card)
        for each in (grid(132), grid(133), grid(133, longest_first=True))
    )
    assert even.seconds - 2e-6 == pytest.approx(work / (0.75 * 128 * card.multiprocessors * card.clock))
    assert uneven.seconds - 2e-6 == pytest.approx(2 * 132 / 133 * (even.seconds - 2e-6)) and graded.seconds == even.seconds


def test_a_program_by_itself_multiplies_and_then_computes() -> None:
    card = CARDS["H100"]
    kernel = Kernel(bytes=0, flops=6e11, instructions=1e10, grid=grid(1320))
    alone = replace(kernel, grid=grid(1320, registers=255))  # four warps of these leave room for one more
    assert alone.grid is not None and alone.grid.resident(card) == 2 and predict([alone], card) == predict([kernel], card)
    alone = replace(kernel, grid=replace(alone.grid, warps=8))
    assert alone.grid is not None and alone.grid.resident(card) == 1
    together = predict([kernel], card).parts["tensor cores"] + 1e10 / (0.75 * 128 * card.multiprocessors * card.clock)
    assert predict([alone], card).seconds == pytest.approx(2e-6 + together)


def test_predictions_take_the_instructions_that_were_counted() -> None:
    """Of every launch of 4-bit products; the table's caps are the suite's."""
    for architecture, table in launches().items():
        for launch in table.values():
            for dtype in (torch.bfloat16, torch.float16):
                own = fitted(launch, dtype)
                found = machine_code(own, dtype, architecture)
                assert 1 < found.per_number <= PER_WEIGHT[own.block_t] and found.registers > 16 and found.shared > 1024
    with pytest.raises(KeyError):
        counted("4-bit product", "bf16", "another", "sm_90")


@pytest.mark.parametrize("make", (norm_with_sums, gate_with_sums))
def test_sums_are_checked_with_what_they_are_of(make: Callable[[Sizes, int], Case]) -> None:
    case = make(Sizes(name="tiny", hidden=256, layers=1, heads=1, kv_heads=1, ffn=384), 3)
    built = case.build(CPU)
    assert built.difference().within(case.tolerance)
    for place in (0, 1):  # the numbers, the sums
        result = built.run()
        result[place].view(-1)[5].add_(4)
        assert not difference(built.observe(result), built.want()).within(case.tolerance)


def spoiled(case: Case, spoil: Callable[[torch.Tensor], Any]) -> Case:
    """The same, with results that `spoil` changes in place."""

    def build(device: torch.device) -> Built:
        built = case.build(device)

        def run() -> torch.Tensor:
            result = built.run()
            spoil(result)
            return result

        return replace(built, run=run, rivals=lambda: iter([lambda: Rival(name="right", run=built.run)]))

    return replace(case, build=build)


def test_a_wrong_result_gets_no_speed() -> None:
    right = product("tiny", "64 x 256", 64, 256, 3)
    good = replace(right, build=lambda device: replace(right.build(device), rivals=lambda: iter(())))
    wrong = spoiled(right, lambda result: result[1, 2].add_(1))
    broken = spoiled(right, lambda result: result[0, 0].fill_(float("nan")))

    def refuse(device: torch.device) -> Built:
        raise ValueError("no\nway")

    raising = replace(right, build=refuse)
    timed: list[int] = []
    lines: list[str] = []
    report = Report(say=lines.append)

    def seconds(run: Callable[[], object]) -> float:
        timed.append(1)
        return 2e-6

    run_cases([good, wrong, broken, raising], CPU, seconds, Rates(bandwidth=1e9, rate=1e9), report, time.monotonic() + 600)
    assert len(timed) == 1, "what is wrong is not timed at all"
    (row,) = report.kernels
    assert row["microseconds"] == 2.0 and row["share_of_limit"] == pytest.approx(right.work.flops / 1e9 / 2e-6)
    assert len(report.failed) == 3 and sum(line.startswith("check failed: tiny AWQ product") for line in lines) == 3
    assert "ValueError: no" in report.failed[2]


def test_a_wrong_rival_gets_no_speed_either_and_time_ends() -> None:
    case = product("tiny", "64 x 256", 64, 256, 3)

    def build(device: torch.device) -> Built:
        built = case.build(device)
        others = [Rival(name="right", run=built.run), Rival(name="off", run=lambda: built.run() + 1)]
        return replace(built, rivals=lambda: iter([lambda: others[0], lambda: others[1], missing, missing]))

    def missing() -> Rival:
        raise ImportError("No module named 'marlin'")

    lines: list[str] = []
    report = Report(say=lines.append)
    cases = [replace(case, build=build)]
    rates = Rates(bandwidth=1e9, rate=1e9)
    run_cases(cases, CPU, lambda run: 1e-6, rates, report, time.monotonic() + 600)
    assert report.kernels[0]["times_as_fast"] == {"right": 1.0} and not report.failed
    assert sum("marlin" in line for line in lines) == 1 and any("with off in AWQ product" in line for line in lines)
    run_cases(cases * 3, CPU, lambda run: 1e-6, rates, report, time.monotonic() - 1)
    assert len(report.skipped) == 3 and len(report.kernels) == 1
