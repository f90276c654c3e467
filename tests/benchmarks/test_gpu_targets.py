"""What the GPU benchmark says of targets: arithmetic on times that are known here, and that its tables are whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.cards import CARDS, card_of
from benchmarks.gpu.kernels import Rates, Report
from benchmarks.gpu.predict import Prediction
from benchmarks.gpu.products import product_kernels
from benchmarks.gpu.sizes import MODELS
from benchmarks.gpu.steps import plan_steps, predict_step
from benchmarks.gpu.target_report import judge_targets, plan_targets
from benchmarks.gpu.targets import FLOOR, STEP, Target, is_met, target_cases, targets

ROOT = Path(__file__).parents[2]
CASE, WHOLE = ("8b", "norm", "4096 x 3584"), ("8b", "awq", "decode, batch 1, context 1024")
RATES = Rates(bandwidth=1e12, rate=1e15)


def a_target(**given: Any) -> Target:
    """80 % of the bandwidth on an H100; predicted are 90 us, and the reference 80."""
    settings: dict[str, Any] = {
        "wording": "norm: 80% of the bandwidth",
        "shape": CASE[2],
        "basis": "bandwidth",
        "factors": {"H100": 0.8},
        "key": CASE,
        "reference": lambda card: 80e-6,
        "predicted": lambda card: Prediction({"memory": 80e-6, "launches": 10e-6}, 1),
    }
    return Target(**settings | given)


def measured(**figures: float) -> Report:
    """A kernel of 80 MB and a step, as the benchmark notes them."""
    report = Report(say=lambda line: None)
    times = {"F.linear": 2.5}
    row = {"microseconds": figures.get("kernel", 99.0), "bytes": 80_000_000, "times_as_fast": times}
    report.kernels.append(dict(zip(("model", "kernel", "shape"), CASE, strict=True)) | row)
    step = {"milliseconds": 9.0, "graph_milliseconds": figures.get("step", 2.0)}
    report.models.append({"model": "8b", "what": "encode"})
    report.models.append(dict(zip(("model", "form", "what"), WHOLE, strict=True)) | step)
    return report


def judged(target: Target, report: Report, device: str = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    judge_targets(report, RATES, device, [target])
    (row,) = report.targets
    return row


def test_a_share_of_the_bandwidth_from_a_known_time() -> None:
    row = judged(a_target(), measured(kernel=99.0))  # 80 MB at 1 TB/s are 80 us, 80 % of it 100
    assert row["limit_us"] == pytest.approx(100) and row["measured_us"] == 99 and row["met"] is True
    assert row["predicted_us"] == pytest.approx(90)
    assert judged(a_target(), measured(kernel=101.0))["met"] is False


def test_other_references() -> None:
    against = a_target(basis="F.linear", factors={"H100": 2.0})
    assert judged(against, measured(kernel=40.0))["limit_us"] == pytest.approx(2.5 * 40 / 2)
    assert judged(replace(against, factors={"H100": 2.6}), measured())["met"] is False
    share = a_target(basis=STEP, factors={"H100": 50.0}, step=WHOLE)
    assert judged(share, measured(kernel=39.0, step=2.0))["limit_us"] == pytest.approx(40)
    whole = a_target(basis=FLOOR, factors={"H100": 0.5}, key=WHOLE)
    row = judged(whole, measured(step=0.15))
    assert row["measured_us"] == pytest.approx(150) and row["limit_us"] == pytest.approx(160) and row["met"] is True


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    assert judged(a_target(basis="Marlin"), measured())["met"] is None
    assert judged(a_target(), Report(say=lambda line: None))["met"] is None
    assert judged(a_target(), measured(), "NVIDIA H200")["met"] is None, "it has no target there"
    assert judged(a_target(key=None), measured())["measured_us"] is None
    report = measured()
    judge_targets(report, RATES, "NVIDIA L4")
    assert not report.targets
    assert card_of("NVIDIA B200") == CARDS["B200"] and card_of("NVIDIA L4") is None


def test_a_target_that_the_prediction_misses_is_said_to_be_missed() -> None:
    lines: list[str] = []
    report = Report(say=lines.append)
    plan_targets(report, [a_target(factors={"H100": 0.9, "H200": 0.8})])  # 88.9 and 100 us, where 90 are predicted
    by_card = {row["card"]: row for row in report.targets}
    assert [by_card[name]["met"] for name in CARDS] == [None, False, True, None]
    row = next(line for line in lines if line.startswith("| norm"))
    cells = ("90.0, no target: memory", "90.0 of 88.9, NOT MET: memory", "90.0 of 100.0, met: memory")
    assert all(f"| {cell} |" in row for cell in cells)
    assert lines[-2] == "1 of these are not met by the prediction:"
    assert lines[-1].strip().startswith("H100: norm") and "us: memory 80.0, launches 10.0" in lines[-1]


def test_what_takes_as_long_as_it_may_is_met() -> None:
    assert is_met(1.0, 2.0) is True and is_met(3.0, 2.0) is False and is_met(2.0, 2.0) is True
    assert is_met(None, 2.0) is None and is_met(1.0, None) is None


@pytest.fixture(scope="module")
def planned() -> tuple[Report, list[str]]:
    lines: list[str] = []
    report = Report(say=lines.append)
    plan_targets(report)
    return report, lines


def test_every_target_is_printed_for_every_card(planned: tuple[Report, list[str]]) -> None:
    report, lines = planned
    every = targets()
    assert len({(target.wording, target.shape) for target in every}) == len(every) >= 25
    for target in every:
        assert set(target.factors) <= set(CARDS) and target.factors
        assert sum(line.startswith(f"| {target.wording} | {target.shape} |") for line in lines) == 1
    assert len(report.targets) == len(every) * len(CARDS)
    missed = [row for row in report.targets if row["met"] is False]
    assert missed and all(row["predicted_us"] > row["limit_us"] for row in missed)
    assert all(row["predicted_us"] == pytest.approx(sum(row["parts_us"].values())) for row in report.targets)
    said = [line for line in lines if line.startswith("    ")]
    assert len(said) == len(missed) and all(f"{row['card']}: {row['target']}, {row['shape']}" in " ".join(said) for row in missed)


def test_the_document_has_the_table_that_the_dry_run_prints(planned: tuple[Report, list[str]]) -> None:
    document = (ROOT / "docs/kernel_targets.md").read_text().splitlines()
    steps_lines: list[str] = []
    plan_steps(MODELS["8b"], Report(say=steps_lines.append))
    for line in (*planned[1], *steps_lines):
        if line.startswith("| "):
            assert line in document, "print it anew: make bench-gpu ARGS=--dry-run"


def test_each_target_has_a_case_or_a_step_that_is_measured() -> None:
    measured_cases = {(case.model, case.kernel, case.shape) for case in target_cases()}
    keys = {target.key for target in targets() if target.key is not None}
    assert keys == measured_cases | {WHOLE}
    rivals = {target.basis for target in targets()}
    assert rivals == {"bandwidth", "F.linear", "FlashInfer", "SDPA", STEP, FLOOR}


def test_a_step_has_the_kernels_of_its_cases() -> None:
    """A layer in 4 bits has two for a product, a bias, one more for the sums of the output projection, and attention's two."""
    card, model = CARDS["H200"], MODELS["8b"]
    numbers = [len(product_kernels(card, *model.linears["o_proj"], 1, is_summed=is_summed)) for is_summed in (False, True)]
    assert numbers == [3, 2]
    assert len(product_kernels(card, *model.linears["o_proj"], 1024, is_summed=False)) == 2, "spread out, multiplied"
    around = 2 + 1 + 1 + 2  # embedding and angles, the last norm, the head, the likeliest token
    assert predict_step(model, "awq", 1, card).kernels == 28 * (4 * 2 + 1 + 1 + 2 + 2 + 1 + 1) + around
    assert predict_step(model, "bf16", 1, card).kernels == 28 * (4 + 2 + 2 + 1 + 1) + around
    for form in ("bf16", "awq"):
        for batch in (1, 64):
            assert card.floor(model.decode(form, batch, 1024)) < predict_step(model, form, batch, card).seconds
