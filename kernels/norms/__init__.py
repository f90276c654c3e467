"""Norms: what fits goes to a kernel on a GPU, and to torch's operators elsewhere. Letters: reference.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.norms.reference import check_parameters, check_weight, rms_norm_ref
from vlserve.kernels.with_triton import runs_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, sums: torch.Tensor | None = None) -> torch.Tensor:
    """As `rms_norm_ref`; raises ValueError when weight is not one value per channel, or `sums` no room for the sums."""
    check_weight(x, weight)
    if runs_triton(x):
        from vlserve.kernels.norms.triton import rms_norm_triton

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
        from vlserve.kernels.norms.triton import add_rms_norm_triton

        check_weight(x, weight)
        return add_rms_norm_triton(x, residual, weight, eps, sums)
    total = x + residual
    return rms_norm(total, weight, eps, sums), total


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """As `layer_norm_ref`; raises ValueError when weight or bias is not one value per channel."""
    check_parameters(x, weight=weight, bias=bias)
    if runs_triton(x):
        from vlserve.kernels.norms.triton import layer_norm_triton

        return layer_norm_triton(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_scaled_norm(
    branch: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_scaled_norm_ref`; raises ValueError when the shapes do not fit."""
    if branch.shape != residual.shape:
        raise ValueError(f"branch is {tuple(branch.shape)} but residual is {tuple(residual.shape)}; expected equal shapes")
    check_parameters(branch, scale=scale, weight=weight, bias=bias)
    if runs_triton(branch):
        from vlserve.kernels.norms.triton import add_scaled_norm_triton

        return add_scaled_norm_triton(branch, residual, scale, weight, bias, eps)
    total = residual + branch * scale
    return rms_norm(total, weight, eps) if bias is None else layer_norm(total, weight, bias, eps), total
