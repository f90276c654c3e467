"""The gate of a SwiGLU feed-forward: silu(gate) * up, both halves in one tensor.

Source: Shazeer 2020 (arXiv 2002.05202). Shapes: T tokens, F feed-forward width of this rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.group_sums.reference import group_sums_ref
from vlserve.kernels.with_triton import runs_triton


def silu_mul_ref(gate_up: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up [..., 2F], gate first -> [..., F].

    Args:
        sums: room for the result's `group_sums` (group_sums/reference.py), where they are wanted with it.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    out = (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
    if sums is not None:
        group_sums_ref(out.flatten(0, -2), sums)
    return out


def silu_mul(gate_up: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
    """As `silu_mul_ref`; raises ValueError for an odd last dimension, or when `sums` is no room for the sums."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"the last dimension is {gate_up.shape[-1]}, expected gate and up of equal width")
    if runs_triton(gate_up):
        from vlserve.kernels.silu_mul_triton import silu_mul_triton

        return silu_mul_triton(gate_up, sums)
    if sums is not None:
        return silu_mul_ref(gate_up, sums)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
