"""Layer norm, and the end of a vision transformer's branch: layer scale, residual sum and the norm that follows.

Sources: Ba et al. 2016 (arXiv 1607.06450); the layer scale Touvron et al. 2021 (arXiv 2103.17239). Mean and variance are in
float32. Shapes: any leading dimensions, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.rms_norm import rms_norm, rms_norm_ref
from vlserve.kernels.with_triton import runs_triton

Pair = tuple[torch.Tensor, torch.Tensor]


def layer_norm_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * (x - mean) / sqrt(variance + eps) + bias` over the last dimension; x [..., C], weight [C] -> [..., C]."""
    x32 = x.float()
    x32 = x32 - x32.mean(-1, keepdim=True)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (x32 * weight.float() + bias.float()).to(x.dtype)


def add_scaled_norm_ref(
    branch: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> Pair:
    """The norm of `residual + scale * branch`, and that sum, both [..., C]; without a bias it is the root-mean-square norm."""
    total = residual + branch * scale
    return rms_norm_ref(total, weight, eps) if bias is None else layer_norm_ref(total, weight, bias, eps), total


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """As `layer_norm_ref`; raises ValueError when weight or bias is not one value per channel."""
    _check(x, weight=weight, bias=bias)
    if runs_triton(x):
        from vlserve.kernels.layer_norm_triton import layer_norm_triton

        return layer_norm_triton(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_scaled_norm(
    branch: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> Pair:
    """As `add_scaled_norm_ref`; raises ValueError when the shapes do not fit."""
    if branch.shape != residual.shape:
        raise ValueError(f"branch is {tuple(branch.shape)} but residual is {tuple(residual.shape)}; expected equal shapes")
    _check(branch, scale=scale, weight=weight, bias=bias)
    if runs_triton(branch):
        from vlserve.kernels.layer_norm_triton import add_scaled_norm_triton

        return add_scaled_norm_triton(branch, residual, scale, weight, bias, eps)
    total = residual + branch * scale
    return rms_norm(total, weight, eps) if bias is None else layer_norm(total, weight, bias, eps), total


def _check(x: torch.Tensor, **parameters: torch.Tensor | None) -> None:
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != x.shape[-1:]:
            shape = tuple(parameter.shape)
            raise ValueError(f"{name} is {shape}, expected one value for each of the {x.shape[-1]} channels")
