"""Where it ran, and the roofline."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cards import CARDS
from benchmarks.gpu.kernels import Rates, Report

PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "gemlite", "marlin")


def machine(device: torch.device | None) -> dict[str, Any]:
    """Card, driver and versions, as far as they can be known."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if device is not None:
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "card": properties.name,
            "architecture": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": properties.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return found


def driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The NVIDIA driver's version, None where Linux does not say it."""
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", path.read_text()) if path.exists() else None
    return found[0] if found else None


def plot(path: Path, report: Report, rates: Rates | None) -> None:
    """Operations a second over operations a byte. Without `rates` it is the estimate for an H100. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    card = CARDS["H100"]
    bandwidth, rate = (rates.bandwidth, rates.rate) if rates else (card.bandwidth, card.rate)
    figure, axes = pyplot.subplots(figsize=(9, 6))
    intensities = [2**power for power in range(-3, 13)]
    axes.plot(intensities, [min(rate, bandwidth * x) / 1e12 for x in intensities], color="black", label="limit")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in report.kernels:
        seconds = 1e-6 * (row["microseconds"] if rates else row["cards"]["H100"]["estimate_us"])
        if row["flops"]:
            points.setdefault(row["kernel"], []).append((row["flops"] / row["bytes"], row["flops"] / seconds / 1e12))
    for kernel, found in points.items():
        axes.scatter(*zip(*found, strict=True), s=14, label=kernel)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="tera-operations a second")
    axes.set_title("measured" if rates else "estimated for an H100 by arithmetic: nothing was timed")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
