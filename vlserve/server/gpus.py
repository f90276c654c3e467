"""What the driver says about the GPUs of this machine. Without the library or a driver there is nothing to say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One GPU now; None where the driver does not tell."""

    index: int  # NVML's, which CUDA_VISIBLE_DEVICES does not change
    utilisation: float | None = None  # 0 to 1, share of the last sampling period with a kernel running
    used_bytes: int | None = None  # by every process
    total_bytes: int | None = None


class Gpus:
    """Finds the library once; `read` asks the driver each time."""

    def __init__(self) -> None:
        self._nvml: Any = None
        with contextlib.suppress(ImportError):
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):  # no driver
                pynvml.nvmlInit()
                self._nvml = pynvml

    def read(self) -> list[GpuReading]:
        return [] if self._nvml is None else list(self._read())

    def _read(self) -> Iterator[GpuReading]:
        nvml = self._nvml
        count = self._ask(nvml.nvmlDeviceGetCount)
        for index in range(count or 0):
            handle = self._ask(nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                continue
            utilisation = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
            memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
            yield GpuReading(
                index=index,
                utilisation=None if utilisation is None else utilisation.gpu / 100,
                used_bytes=None if memory is None else memory.used,
                total_bytes=None if memory is None else memory.total,
            )

    def _ask(self, question: Any, *arguments: Any) -> Any:
        """None where a device cannot answer, e.g. the utilisation of a slice of a GPU."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None
