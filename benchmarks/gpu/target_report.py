"""The table of targets: by arithmetic on the named cards, and as measured on the one at hand."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.cards import CARDS, Card, card_of
from benchmarks.gpu.kernels import Rates, Report
from benchmarks.gpu.targets import BANDWIDTH, FLOOR, STEP, Target, is_met, targets

HEADER = """targets, by arithmetic alone (benchmarks/gpu/predict.py says what is assumed): nothing of this was timed.
A cell has the predicted time of the one to be reached, in us, and what 15 % and more of it is spent on"""
SAID = {True: "met", False: "NOT MET", None: "not judged"}


def plan_targets(report: Report, found: list[Target] | None = None) -> None:
    """Every target on every card, and why those are missed that are."""
    report.say(HEADER)
    report.say(f"| target | shape | {' | '.join(CARDS)} |")
    report.say(f"| --- | --- | {' | '.join('---' for _ in CARDS)} |")
    missed = []
    for target in targets() if found is None else found:
        cells = []
        for card in CARDS.values():
            prediction = target.predicted(card)
            limit = target.limit(card.name, target.reference(card))
            row = {"target": target.wording, "shape": target.shape, "card": card.name}
            row |= {"reasons": prediction.largest(0.15)}
            row |= {"predicted_us": 1e6 * prediction.seconds, "kernels": prediction.kernels}
            row |= {"parts_us": {name: 1e6 * seconds for name, seconds in prediction.parts.items()}}
            row |= {"limit_us": None if limit is None else 1e6 * limit}
            row |= {"met": is_met(prediction.seconds, limit)}
            report.targets.append(row)
            cells.append(_cell(row))
            if row["met"] is False:
                missed.append(
                    f"{card.name}: {target.wording}, {target.shape}: {row['predicted_us']:.1f} us where "
                    f"{row['limit_us']:.1f} are to be reached; kernels: {prediction.kernels}; us: {prediction}"
                )
        report.say(f"| {target.wording} | {target.shape} | {' | '.join(cells)} |")
    report.say(f"{len(missed)} of these are not met by the prediction:" if missed else "the prediction meets all of these")
    for line in missed:
        report.say(f"    {line}")


def _cell(row: dict[str, Any]) -> str:
    predicted, reasons = f"{row['predicted_us']:.1f}", ", ".join(row["reasons"])
    if row["limit_us"] is None:
        return f"{predicted}, no target: {reasons}"
    return f"{predicted} of {row['limit_us']:.1f}, {SAID[row['met']]}: {reasons}"


def judge_targets(report: Report, rates: Rates, device_name: str, found: list[Target] | None = None) -> None:
    """The same table for the device at hand, with what was measured; a target without a figure is neither met nor missed."""
    card = card_of(device_name)
    if card is None:
        report.say(f"no targets: {device_name} is none of {', '.join(CARDS)}")
        return
    report.say(f"targets on {device_name}, in us; predictions are arithmetic")
    for target in targets() if found is None else found:
        prediction = target.predicted(card)
        took, reference = _measured(target, report, rates, card)
        limit = None if reference is None else target.limit(card.name, reference)
        row: dict[str, Any] = {"target": target.wording, "shape": target.shape, "card": card.name}
        row |= {"predicted_us": 1e6 * prediction.seconds, "measured_us": None if took is None else 1e6 * took}
        row |= {"limit_us": None if limit is None else 1e6 * limit}
        row |= {"met": is_met(took, limit)}
        report.targets.append(row)
        figures = (f"{name} {'-' if row[key] is None else format(row[key], '.1f')}" for name, key in _FIGURES.items())
        report.say(f"    {target.wording}, {target.shape}: {', '.join(figures)}: {SAID[row['met']]}")


_FIGURES = {"to be reached": "limit_us", "measured": "measured_us", "predicted": "predicted_us"}


def _measured(target: Target, report: Report, rates: Rates, card: Card) -> tuple[float | None, float | None]:
    """Seconds that it took, and those of its reference; None for what was not measured."""
    if target.basis == FLOOR:
        return _step_seconds(report, target.key), target.reference(card)
    row = next((row for row in report.kernels if (row["model"], row["kernel"], row["shape"]) == target.key), None)
    if row is None:
        return None, None
    took = row["microseconds"] / 1e6
    if target.basis == BANDWIDTH:
        return took, row["bytes"] / rates.bandwidth
    if target.basis == STEP:
        return took, _step_seconds(report, target.step)
    times = row["times_as_fast"].get(target.basis)
    return took, None if times is None else times * took


def _step_seconds(report: Report, key: tuple[str, str, str] | None) -> float | None:
    """Of a step as a graph."""
    rows = (row for row in report.models if "graph_milliseconds" in row)
    return next((row["graph_milliseconds"] / 1e3 for row in rows if (row["model"], row["weights"], row["what"]) == key), None)
