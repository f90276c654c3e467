"""Products with the experts that each token chose; routes are made once a layer, for all its products. Letters: reference.py.

On a GPU nothing waits for the device, and all sizes follow from T, S and E alone, so that a step can be recorded; elsewhere the
weights of chosen experts alone are read.
"""

from __future__ import annotations

import torch

from vlserve.kernels.experts.cpu import combine_cpu, experts_matmul_cpu, pack_experts_for_cpu, routes_cpu
from vlserve.kernels.experts.reference import check_weights
from vlserve.kernels.experts.types import (
    DenseExperts,
    ExpertWeights,
    Fp8Experts,
    Int4Experts,
    Mxfp4Experts,
    PackedExperts,
    Routes,
)

__all__ = [
    "DenseExperts",
    "ExpertWeights",
    "Fp8Experts",
    "Int4Experts",
    "Mxfp4Experts",
    "PackedExperts",
    "Routes",
    "combine",
    "experts_matmul",
    "prepare",
    "routes",
]


def prepare(weights: ExpertWeights) -> ExpertWeights:
    """The weights in the order that is fastest where they are, put so once, when they have been loaded; what was given is needed
    no more. Raises ValueError when shapes or types do not fit."""
    check_weights(weights)
    if isinstance(weights, Int4Experts) and not weights.codes.is_cuda:
        return pack_experts_for_cpu(weights)
    return weights


def routes(experts: torch.Tensor, num_experts: int, first: int = 0) -> Routes:
    """Where each choice goes.

    Args:
        experts: [T, S] whole numbers; those outside of first..first + num_experts - 1 are other ranks' experts.
        num_experts: that this rank has. first: the number of its first one.
    """
    if experts.ndim != 2 or experts.is_floating_point():
        raise ValueError(f"experts are {tuple(experts.shape)} {experts.dtype}; expected [T, S] whole numbers")
    ours = experts.int() - first
    ours = torch.where((ours >= 0) & (ours < num_experts), ours, num_experts)
    return routes_cpu(ours, num_experts)


def experts_matmul(x: torch.Tensor, weights: ExpertWeights, routes: Routes, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `experts_matmul_ref`, summed in float32: x [T, K], of whose rows each goes to its token's experts, or [T * S, K] ->
    [T * S, N] in x's type.

    Args:
        weights: best as `prepare` gives them. bias: [E, N] or None. Rows of other ranks' experts are zeros.
    """
    experts, outputs, inputs = weights.size
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(
            f"x is {tuple(x.shape)}, expected [T, {inputs}] or [T * S, {inputs}] for {experts} x {outputs} x {inputs}"
        )
    if experts != routes.num_experts:
        raise ValueError(f"the routes are for {routes.num_experts} experts, the weights of {experts}")
    if bias is not None and bias.shape != (experts, outputs):
        raise ValueError(f"bias is {tuple(bias.shape)}, expected [{experts}, {outputs}]")
    return experts_matmul_cpu(x, weights, routes, bias)


def combine(out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `combine_ref`, summed in float32, in the order of the choices: out [T * S, C], weights [T, S] float32 -> [T, C]."""
    if out.ndim != 2 or weights.ndim != 2 or len(out) != weights.numel():
        raise ValueError(f"out and weights are {tuple(out.shape)} and {tuple(weights.shape)}; expected [T * S, C] and [T, S]")
    return combine_cpu(out, weights)
