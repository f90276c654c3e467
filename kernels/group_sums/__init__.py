"""`group_sums`, by a kernel on a GPU and by its definition elsewhere; what the sums are: reference.py."""

from __future__ import annotations

import torch

from vlserve.kernels.group_sums.reference import group_sums_ref
from vlserve.kernels.with_triton import runs_triton


def group_sums(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """As `group_sums_ref`; raises ValueError when `out` is no room for the sums of x."""
    if runs_triton(x):
        from vlserve.kernels.group_sums.triton import group_sums_triton

        return group_sums_triton(x, out)
    return group_sums_ref(x, out)
