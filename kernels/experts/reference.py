"""Products with the weights of the experts that a router has chosen for each token, and the weighted sum of what they give.

Source: Shazeer et al. 2017 (arXiv 1701.06538). Letters: T tokens, S experts chosen by a token, E experts that this rank has,
N outputs, K inputs, G groups of inputs. A choice is a token and one of its experts; choice number t * S + s is token t's s-th.
MXFP4 is the Open Compute Project's (Microscaling Formats, version 1.0): E2M1 codes, whose magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4
and 6, with a power of two for each 32 of them, 2^(code - 127).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.experts.types import DenseExperts, ExpertWeights, Fp8Experts, Int4Experts, Mxfp4Experts, Routes, ours
from vlserve.kernels.int4.reference import awq_dequantize_ref

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by code
BIAS = 127  # of E8M0


def dequantize_ref(weights: ExpertWeights) -> torch.Tensor:
    """[E, N, K] float64; raises TypeError for weights in a processor's own order."""
    match weights:
        case DenseExperts():
            return weights.weight.double()
        case Int4Experts():
            parts = zip(weights.codes, weights.scales.double(), weights.zeros, strict=True)
            return torch.stack([awq_dequantize_ref(*part) for part in parts])
        case Fp8Experts():
            codes, (_, _, inputs) = weights.codes.double(), weights.size
            block = weights.block or inputs
            places = (torch.arange(inputs, device=codes.device) + (weights.offset if weights.block else 0)) // block
            return codes * weights.scales.double()[..., places]
        case Mxfp4Experts():
            levels = torch.tensor(E2M1, dtype=torch.float64, device=weights.codes.device)
            numbers = levels[torch.stack((weights.codes & 15, weights.codes >> 4), dim=-1).long()].flatten(-2)
            return (numbers * torch.exp2(weights.scales.double() - BIAS)[..., None]).flatten(-2)
    raise TypeError(f"{type(weights).__name__} is no stored form; its definition is that of what it was made from")


def experts_matmul_ref(x: torch.Tensor, weights: ExpertWeights, routes: Routes, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] or [T * S, K] -> [T * S, N], computed in float64 and rounded once to x's type.

    Args:
        bias: [E, N]. Choices of other ranks' experts are rows of zeros, without one.
    """
    inputs = x.double().repeat_interleave(routes.per_row(x), 0)
    dense = dequantize_ref(weights)
    out = torch.zeros(routes.num_choices, dense.shape[1], dtype=torch.float64, device=x.device)
    local = ours(routes.experts, routes.num_experts, routes.first).flatten().cpu()
    for expert in sorted(set(local.tolist()) - {routes.num_experts}):
        choices = (local == expert).nonzero()[:, 0].to(x.device)
        out[choices] = F.linear(inputs[choices], dense[expert], None if bias is None else bias[expert].double())
    return out.to(x.dtype)


def combine_ref(out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """out [T * S, C] times weights [T, S], added up by token, in float64 and rounded once to out's type: [T, C]."""
    return (out.double().view(*weights.shape, -1) * weights.double()[..., None]).sum(1).to(out.dtype)


def check_weights(weights: ExpertWeights) -> None:
    """Raises ValueError when shapes or types do not fit."""
    shapes: tuple[torch.Tensor, ...]
    match weights:
        case DenseExperts(weight=weight):
            fits = weight.ndim == 3 and weight.is_floating_point()
            shapes, expected = (weight,), "weight [E, N, K] of floating point"
        case Int4Experts(codes=codes, scales=scales, zeros=zeros):
            shapes, expected = (codes, scales, zeros), "codes [E, N, K/2] uint8, scales [E, N, G] and zeros [E, N, G] uint8"
            fits = codes.ndim == 3 and codes.dtype == zeros.dtype == torch.uint8 and scales.is_floating_point()
            fits = fits and scales.shape == zeros.shape and scales.shape[:2] == codes.shape[:2] and _is_grouped(weights)
        case Fp8Experts(codes=codes, scales=scales):
            shapes, expected = (codes, scales), "codes [E, N, K] float8_e4m3fn and scales [E, N, blocks of K] float32"
            block, offset = weights.block, weights.offset
            blocks = 1 if block is None else -(-(offset % block + codes.shape[-1]) // block)
            fits = codes.ndim == 3 and codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
            fits = fits and scales.shape[:2] == codes.shape[:2] and scales.shape[2:] >= (blocks,)
            fits = fits and (block is None or 0 <= offset < block)
        case Mxfp4Experts(codes=codes, scales=scales):
            shapes, expected = (codes, scales), "codes [E, N, K/32, 16] uint8 and scales [E, N, K/32] uint8"
            fits = codes.dtype == scales.dtype == torch.uint8 and codes.shape == (*scales.shape, 16) and scales.ndim == 3
        case _:
            return
    if not fits:
        given = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in shapes)
        raise ValueError(f"{type(weights).__name__} of {given}; expected {expected}")


def _is_grouped(weights: Int4Experts) -> bool:
    inputs, groups = weights.size[2], weights.scales.shape[2]
    size = inputs // groups if groups else 0
    return size * groups == inputs and (groups == 1 or (size >= 16 and not size & (size - 1)))
