"""Root-mean-square layer norm, alone and with the residual sum in front of it.

Source: Zhang & Sennrich 2019 (arXiv 1910.07467); computed in float32 and scaled by the weight in the
input's dtype, as transformers' Llama and Qwen2 do. Shapes: T tokens (any leading dimensions), C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.with_triton import runs_triton


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension; x [..., C], weight [C] -> [..., C]."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `x + residual`, and that sum; both [..., C]."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm_ref`; raises ValueError when weight is not one value per channel."""
    _check(x, weight)
    if runs_triton(x):
        from vlserve.kernels.rms_norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return rms_norm_ref(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm_ref`; raises ValueError when the shapes do not fit."""
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)} but residual is {tuple(residual.shape)}")
    if runs_triton(x):
        from vlserve.kernels.rms_norm_triton import add_rms_norm_triton

        _check(x, weight)
        return add_rms_norm_triton(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected one value for each of the {x.shape[-1]} channels")
