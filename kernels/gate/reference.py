"""The gate of a SwiGLU feed-forward: silu(gate) * up, both halves in one tensor.

Source: Shazeer 2020 (arXiv 2002.05202). Shapes: T tokens, F feed-forward width of this rank.
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
