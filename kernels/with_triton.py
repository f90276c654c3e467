"""Whether an operation's Triton kernel can run, and what kernels ask of tensors. Kernels are imported when they are
first launched: Triton need not exist."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def runs_triton(x: torch.Tensor) -> bool:
    """On CUDA, where Triton is installed."""
    return x.is_cuda and _has_triton()


def check_contiguous(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError with the name of a tensor that is not in one piece, row by row: kernels read on from its beginning."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has strides {tensor.stride()}; expected it in one piece: .contiguous()"
            )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
