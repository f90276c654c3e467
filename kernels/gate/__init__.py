"""The gate: by a kernel on a GPU, and by torch's operators elsewhere. Letters: reference.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.gate.reference import clamped_swiglu_ref, silu_mul_ref
from vlserve.kernels.with_triton import runs_triton


def silu_mul(gate_up: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
    """As `silu_mul_ref`; raises ValueError for an odd last dimension, or when `sums` is no room for the sums."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"the last dimension is {gate_up.shape[-1]}, expected gate and up of equal width")
    if runs_triton(gate_up):
        from vlserve.kernels.gate.triton import silu_mul_triton

        return silu_mul_triton(gate_up, sums)
    if sums is not None:
        return silu_mul_ref(gate_up, sums)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """As `clamped_swiglu_ref`; raises ValueError for an odd last dimension."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"the last dimension is {gate_up.shape[-1]}, expected gate and up of equal width")
    if runs_triton(gate_up):
        from vlserve.kernels.gate.triton import clamped_swiglu_triton

        return clamped_swiglu_triton(gate_up, alpha, limit)
    return clamped_swiglu_ref(gate_up, alpha, limit)
