"""Numbers from the host to a device without waiting for it."""

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
