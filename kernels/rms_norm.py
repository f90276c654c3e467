"""Root-mean-square layer norm, alone and with the residual sum in front of it.

Source: Zhang & Sennrich 2019 (arXiv 1910.07467); computed in float32 and scaled by the weight in the
input's dtype, as transformers' Llama and Qwen2 do. Shapes: T tokens (any leading dimensions), C channels.
`sums`: room for the norm's `group_sums` (group_sums/reference.py), where they are wanted with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.group_sums.reference import group_sums_ref
from vlserve.kernels.with_triton import runs_triton


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float, sums: torch.Tensor | None = None) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension; x [..., C], weight [C] -> [..., C]."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    out = weight * x32.to(x.dtype)
    if sums is not None:
        group_sums_ref(out.flatten(0, -2), sums)
    return out


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, sums: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `x + residual`, and that sum; both [..., C]."""
    total = x + residual
    return rms_norm_ref(total, weight, eps, sums), total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, sums: torch.Tensor | None = None) -> torch.Tensor:
    """As `rms_norm_ref`; raises ValueError when weight is not one value per channel, or `sums` no room for the sums."""
    _check(x, weight)
    if runs_triton(x):
        from vlserve.kernels.rms_norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps, sums)
    if x.dtype == torch.float32 and sums is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_ref(x, weight, eps, sums)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, sums: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm_ref`; raises ValueError when the shapes do not fit."""
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)} but residual is {tuple(residual.shape)}")
    if runs_triton(x):
        from vlserve.kernels.rms_norm_triton import add_rms_norm_triton

        _check(x, weight)
        return add_rms_norm_triton(x, residual, weight, eps, sums)
    total = x + residual
    return rms_norm(total, weight, eps, sums), total


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected one value for each of the {x.shape[-1]} channels")
