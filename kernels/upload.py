"""Numbers from the host to a device and back, without waiting for it before they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def upload(numbers: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n] on `device`. To CUDA from pinned memory, which torch does not give away again before it was read: a copy from other
    memory would wait until the device has done all that was asked of it before."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def pinned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory of the host, not filled, for what goes to `device` afterwards; pinned where that is CUDA."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


class Download:
    """Numbers [n] on their way to the host; `read` waits until they are there, and for nothing that was asked for later."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._there: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = pinned(numbers.shape, numbers.dtype, numbers.device)
            self._numbers.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[int] | list[float]:
        if self._there is not None:
            self._there.synchronize()
        numbers: list[int] | list[float] = self._numbers.tolist()
        return numbers
