"""What was measured, for people: tables, and a plot. The plot needs matplotlib, the extra "bench"."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlserve.commands.bench_measure import Degree, Load, Row
from vlserve.errors import ConfigError

PLOT_KINDS = (".png", ".svg", ".pdf")
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("tp", lambda row: f"{row.tp}"),
    ("at once", lambda row: f"{row.concurrency}"),
    ("requests/s", lambda row: f"{row.requests_per_s:.2f}"),
    ("tokens/s", lambda row: f"{row.tokens_per_s:.1f}"),
    ("per device", lambda row: f"{row.tokens_per_s_per_device:.1f}"),
    ("answer s", lambda row: f"{row.answer_s:.3f}"),
    ("first token ms", lambda row: f"{1000 * row.ttft_s:.1f}"),
    ("per token ms", lambda row: f"{1000 * row.token_s:.2f}"),
    ("communication", lambda row: "-" if row.comm_share is None else f"{row.comm_share:.1%}"),
    ("spread", lambda row: f"{row.spread:.1%}"),
)


def check_plot(path: Path) -> None:
    """Before anything runs: whether a plot can be made and written there; raises ConfigError."""
    if path.suffix.lower() not in PLOT_KINDS:
        raise ConfigError(f"--plot {path}: expected a file that ends in {', '.join(PLOT_KINDS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise ConfigError('--plot needs matplotlib, which is in the extra "bench": pip install "vlserve[bench]"')


def describe(model: str, load: Load) -> str:
    """What is going to be measured."""
    width, height = load.picture_size
    pictures = f"{load.pictures} picture{'s' if load.pictures > 1 else ''} of {width}x{height}" if load.pictures else "no picture"
    return paragraph(
        f"{model}: {load.requests} requests a repetition, each with {pictures}, about {load.prompt_tokens} tokens of text, and "
        f"{load.answer_tokens} tokens of answer; medians of {load.repetitions} repetition{'s' if load.repetitions > 1 else ''}. "
        "The degrees run one after another, each with an engine of its own that is warmed up first."
    )


def paragraph(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def header() -> str:
    return "  ".join(title for title, _ in COLUMNS)


def lines(degree: Degree) -> Iterator[str]:
    """The rows of one degree, below `header`."""
    for row in degree.rows:
        yield "  ".join(value(row).rjust(len(title)) for title, value in COLUMNS)


def memory_lines(degrees: Sequence[Degree]) -> Iterator[str]:
    """MiB of each rank by kind, and how many tokens the KV cache of an engine holds."""
    kinds = memory_kinds(degrees)
    yield "  ".join(["tp", "rank", *(f"{kind} MiB" for kind in kinds), "KV tokens"])
    for degree in degrees:
        for rank, sizes in enumerate(degree.device_bytes):
            values = [f"{sizes.get(kind, 0) / 2**20:.1f}".rjust(len(kind) + 4) for kind in kinds]
            yield "  ".join([f"{degree.tp:2}", f"{rank:4}", *values, f"{degree.kv_tokens:9}"])


def memory_kinds(degrees: Sequence[Degree]) -> list[str]:
    """In the order in which ranks name them."""
    return list(dict.fromkeys(kind for degree in degrees for sizes in degree.device_bytes for kind in sizes))


def draw(degrees: Sequence[Degree], model: str, path: Path) -> None:
    """Six panels over the degree: throughput, latency, communication and memory. Raises ConfigError when it cannot be written."""
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    panels: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
        ("tokens/s", lambda row: row.tokens_per_s),
        ("tokens/s per device", lambda row: row.tokens_per_s_per_device),
        ("share of time in communication, %", lambda row: None if row.comm_share is None else 100 * row.comm_share),
        ("time to first token, ms", lambda row: 1000 * row.ttft_s),
        ("time per token, ms", lambda row: 1000 * row.token_s),
    )
    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(f"{model}: tensor-parallel degrees ({degrees[0].device.partition(':')[0]}, {degrees[0].dtype})")
    axes = figure.subplots(2, 3).flat
    names = [str(degree.tp) for degree in degrees]
    for axis, (title, value) in zip(axes, panels, strict=False):
        for index, row in enumerate(degrees[0].rows):
            values = [value(degree.rows[index]) for degree in degrees]
            axis.plot(names, [float("nan") if v is None else v for v in values], marker="o", label=f"{row.concurrency} at once")
        if all(value(row) is None for degree in degrees for row in degree.rows):
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
            axis.set_yticks([])
        else:
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="tp")
    _draw_memory(figure.axes[-1], degrees, names)
    figure.axes[0].legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error.strerror}") from None


def _draw_memory(axis: Any, degrees: Sequence[Degree], names: Sequence[str]) -> None:
    """Stacked by kind, of the rank that has most."""
    fullest = [max(degree.device_bytes, key=lambda sizes: sum(sizes.values())) for degree in degrees]
    below = [0.0] * len(degrees)
    for kind in memory_kinds(degrees):
        sizes = [rank.get(kind, 0) / 2**30 for rank in fullest]
        axis.bar(names, sizes, bottom=below, width=0.5, label=kind.replace("_", " "))
        below = [base + size for base, size in zip(below, sizes, strict=True)]
    axis.set(title="GiB of the fullest rank", xlabel="tp", xlim=(-0.7, len(degrees) - 0.3))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
