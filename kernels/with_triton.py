"""Whether an operation's Triton kernel can run. Kernels are imported when they are first launched: Triton need not exist."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def runs_triton(x: torch.Tensor) -> bool:
    """On CUDA, where Triton is installed."""
    return x.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
