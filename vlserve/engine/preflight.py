"""What a rank tries out when it is started for a preflight: its device, and all-reduces of several sizes on the real group."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from vlserve.engine.messages import AllReduceTime
from vlserve.errors import EngineError
from vlserve.llm.tensor_parallel import Group

SIZES = (2**13, 2**16, 2**19, 2**22, 2**24, 2**26)  # bytes: a decode step's sums are small, a prefill's large
SMALL, SMALL_TIMES, LARGE_TIMES = 2**19, 20, 5  # repetitions of sizes up to SMALL, and of the others


def try_device(device: torch.device) -> None:
    """One computation; raises what torch raises where the device cannot run its kernels."""
    total = float(torch.ones(1024, device=device).sum())
    if total != 1024:
        raise EngineError(f"1024 ones add up to {total} on {device}; the device or its driver is broken")


def time_all_reduce(group: Group, device: torch.device, progress: Callable[[int, int], None]) -> list[AllReduceTime]:
    """The median time of each size; every result is compared. Raises EngineError for a wrong one.

    All ranks call it together, and nothing is done by one alone.
    """
    if group.size == 1:
        return []
    times = []
    for done, num_bytes in enumerate(SIZES):
        progress(done, len(SIZES))
        times.append(AllReduceTime(num_bytes=num_bytes, seconds=_median_time(group, device, num_bytes)))
    return times


def _median_time(group: Group, device: torch.device, num_bytes: int) -> float:
    # whole numbers below 2**24, which float32 adds up exactly in any order
    places = torch.arange(num_bytes // 4, device=device).remainder_(128).float()
    expected = places * group.size + sum(range(group.size))
    x = torch.empty_like(places)
    ready = torch.zeros(1)
    seconds = []
    for _ in range(1 + (SMALL_TIMES if num_bytes <= SMALL else LARGE_TIMES)):
        torch.add(places, group.rank, out=x)
        _wait_for(device)
        group.all_reduce(ready, "preflight barrier")  # on the host: nobody's time has another's lateness in it
        begun = time.perf_counter()
        group.all_reduce(x, "preflight")
        _wait_for(device)
        seconds.append(time.perf_counter() - begun)
        if not torch.equal(x, expected):
            raise EngineError(f"rank {group.rank}: an all-reduce of {num_bytes} bytes on {device} gave a wrong sum")
    return statistics.median(seconds[1:])  # the first makes connections


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
