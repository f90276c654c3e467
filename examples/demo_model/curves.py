"""A training run's curves as a picture: losses, and the share of right answers by task and language."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(log: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for key in ("places", "answers", "looks"):
        rows = [row for row in log if key in row]
        left.plot([row["step"] for row in rows], [row[key] for row in rows], label=key)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    left.legend()
    tasks = sorted({key for row in log for key in row if " " in key})
    colours = pyplot.get_cmap("tab20")
    for i, task in enumerate(sorted({key.split()[0] for key in tasks})):
        for language, style in (("en", "-"), ("zh", ":")):
            rows = [row for row in log if f"{task} {language}" in row]
            steps, values = [row["step"] for row in rows], [100 * row[f"{task} {language}"] for row in rows]
            right.plot(
                steps, _smooth(values), style, color=colours(i % 20), label=task if language == "en" else None, linewidth=1
            )
    right.set(xlabel="step", ylabel="answers right as a whole, % (dotted: Chinese)", ylim=(0, 101))
    right.legend(fontsize=7, ncols=2, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _smooth(values: list[float]) -> list[float]:
    out: list[float] = []
    for value in values:
        out.append(value if not out else 0.6 * out[-1] + 0.4 * value)
    return out
