"""The gate of a SwiGLU feed-forward: silu(gate) * up, both halves in one tensor; and the clamped one of GPT-OSS.

Sources: Shazeer 2020 (arXiv 2002.05202); GPT-OSS (arXiv 2508.10925). Shapes: T tokens, F feed-forward width of this rank.
"""

from __future__ import annotations

import torch

from vlserve.kernels.group_sums.reference import group_sums_ref


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


def clamped_swiglu_ref(gate_up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """gate_up [..., 2F], gate first -> [..., F]: (up + 1) * gate * sigmoid(alpha * gate), in float32, or float64 where it is.

    Args:
        limit: the gate's highest value, and the up's farthest from zero.
    """
    numbers = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = numbers.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(alpha * gate)).to(gate_up.dtype)
