"""How far a kernel's result is from its definition, and how long it takes on a CUDA device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSHED = 2**28  # bytes written before each run, at least; more than any L2 cache
WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """`relative`: norm of the error over norm of the definition; `largest`: what no number of it exceeds, see `difference`."""

    relative: float
    largest: float

    def within(self, other: Difference) -> bool:
        """False for NaN as well."""
        return self.relative <= other.relative and self.largest <= other.largest

    def __str__(self) -> str:
        return f"relative {self.relative:.1e}, largest {self.largest:.1e}"


def difference(got: torch.Tensor, want: torch.Tensor) -> Difference:
    """Between a result and its definition in float64.

    `largest` is the greatest error of a number, less half a step of the result's type (which rounding may cost), over the root
    mean square of the definition: 0 for a result that is rounded once.
    """
    if got.shape != want.shape:
        raise ValueError(f"the result is {tuple(got.shape)}, the definition {tuple(want.shape)}")
    want = want.double()
    error = (got.double() - want).abs()
    step = torch.finfo(got.dtype).eps / 2 if got.is_floating_point() else 0.0
    norm = want.norm().clamp_min(torch.finfo(torch.float64).tiny)
    beyond = (error - step * want.abs()).clamp_min(0).max() / norm * want.numel() ** 0.5
    return Difference(float(error.norm() / norm), float(beyond))


class Timer:
    """Times work on a CUDA device by events; before each run the L2 cache is overwritten.

    The work is recorded as a CUDA graph where that is possible, so that no launch waits for Python.
    """

    def __init__(self, device: torch.device, *, runs: int = 20) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.device, self.runs = device, runs
        self._flushed = torch.empty(max(FLUSHED, 2 * cache), dtype=torch.int8, device=device)

    def __call__(self, work: Callable[[], object]) -> float:
        """Seconds, the median of all runs."""
        with torch.cuda.device(self.device):
            run = recorded(work)
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.runs)]
            for begin, end in events:
                self._flushed.zero_()
                begin.record()
                run()
                end.record()
            torch.cuda.synchronize()
            return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def recorded(work: Callable[[], object]) -> Callable[[], object]:
    """`work`, warmed up, as the replay of a CUDA graph; or as it is, where it does what a graph cannot hold."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = work()
    except RuntimeError:
        torch.cuda.synchronize()
        return work

    def replay(_kept: object = kept) -> None:  # what the graph writes to must live as long as it
        graph.replay()

    return replay


def by_outputs(work: Callable[..., torch.Tensor], *weights: torch.Tensor, step: int = 4096) -> torch.Tensor:
    """work(*weights) [T, N] in pieces of N, which the weights' first axes are: for definitions that take much memory."""
    return torch.cat([work(*parts) for parts in zip(*(tensor.split(step) for tensor in weights), strict=True)], dim=-1)
