"""Norms over the channels, alone and with what stands in front of them: a residual sum, and a vision transformer's layer scale.

Sources: the root-mean-square norm Zhang & Sennrich 2019 (arXiv 1910.07467), computed in float32 and scaled by the weight in
the input's dtype, as transformers' Llama and Qwen2 do; layer norm Ba et al. 2016 (arXiv 1607.06450), with mean and variance in
float32; the layer scale Touvron et al. 2021 (arXiv 2103.17239). Shapes: T tokens (any leading dimensions), C channels.
`sums`: room for the norm's `group_sums` (group_sums/reference.py), where they are wanted with it.
"""

from __future__ import annotations

import torch

from vlserve.kernels.group_sums.reference import group_sums_ref


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


def layer_norm_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * (x - mean) / sqrt(variance + eps) + bias` over the last dimension; x [..., C], weight [C] -> [..., C]."""
    x32 = x.float()
    x32 = x32 - x32.mean(-1, keepdim=True)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (x32 * weight.float() + bias.float()).to(x.dtype)


def add_scaled_norm_ref(
    branch: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `residual + scale * branch`, and that sum, both [..., C]; without a bias it is the root-mean-square norm."""
    total = residual + branch * scale
    return rms_norm_ref(total, weight, eps) if bias is None else layer_norm_ref(total, weight, bias, eps), total


def check_weight(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ValueError unless there is one value per channel."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected one value for each of the {x.shape[-1]} channels")


def check_parameters(x: torch.Tensor, **parameters: torch.Tensor | None) -> None:
    """As `check_weight`, with the names of those that are there."""
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != x.shape[-1:]:
            shape = tuple(parameter.shape)
            raise ValueError(f"{name} is {shape}, expected one value for each of the {x.shape[-1]} channels")
