"""Until kernels/experts/ is there: the same names in torch's operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlserve.kernels.int4.reference import awq_dequantize_ref


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseExperts:
    weight: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int4Experts:
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fp8Experts:
    codes: torch.Tensor
    scales: torch.Tensor
    block: int | None
    offset: int


ExpertWeights = DenseExperts | Int4Experts | Fp8Experts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routes:
    experts: torch.Tensor  # [T*S] of this rank, -1 for another's
    top_k: int


def routes(experts: torch.Tensor, num_experts: int, first: int) -> Routes:
    own = experts.flatten() - first
    return Routes(experts=torch.where((own >= 0) & (own < num_experts), own, -1), top_k=experts.shape[1])


def experts_matmul(x: torch.Tensor, weights: ExpertWeights, where: Routes, bias: torch.Tensor | None = None) -> torch.Tensor:
    if len(x) != len(where.experts):
        x = x.repeat_interleave(where.top_k, 0)
    out = None
    for expert in where.experts.unique().tolist():
        if expert >= 0:
            rows = (where.experts == expert).nonzero()[:, 0]
            y = F.linear(x[rows], _weight(weights, expert).to(x.dtype), None if bias is None else bias[expert])
            out = x.new_zeros(len(x), y.shape[1]) if out is None else out
            out[rows] = y
    if out is None:
        held = weights.weight if isinstance(weights, DenseExperts) else weights.codes
        out = x.new_zeros(len(x), held.shape[1])
    return out


def combine(out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows = out.view(*weights.shape, -1).float() * weights.unsqueeze(-1)
    total = rows[:, 0]
    for place in range(1, rows.shape[1]):
        total = total + rows[:, place]
    return total.to(out.dtype)


def _weight(weights: ExpertWeights, expert: int) -> torch.Tensor:
    if isinstance(weights, DenseExperts):
        return weights.weight[expert]
    if isinstance(weights, Int4Experts):
        return awq_dequantize_ref(weights.codes[expert], weights.scales[expert], weights.zeros[expert])
    codes, scales = weights.codes[expert].float(), weights.scales[expert]
    if weights.block is None:
        return codes * scales
    places = (torch.arange(codes.shape[1], device=codes.device) + weights.offset) // weights.block
    return codes * scales[:, places]
