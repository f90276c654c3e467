"""`experts` by torch's operators, an expert after the other, on any device: the weights of those that nobody chose are not read.

Codes become numbers of the compute type by tables, a few rows of an expert at a time. 4-bit weights have torch's own operator.
Letters: reference.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from vlserve.kernels.experts.reference import BIAS, E2M1
from vlserve.kernels.experts.types import (
    DenseExperts,
    ExpertWeights,
    Fp8Experts,
    Int4Experts,
    Mxfp4Experts,
    PackedExperts,
    Routes,
)
from vlserve.kernels.int4.cpu import PlainInt4, awq_matmul_cpu, pack_for_cpu

BLOCK = 2**19  # weights that are spread out at once, so that they stay in the processor's cache
WORDS = {2: torch.int32, 4: torch.int64, 8: torch.complex128}  # that hold two numbers, by the bytes of one


def routes_cpu(experts: torch.Tensor, num_experts: int) -> Routes:
    """experts [T, S] as in `Routes`."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
    parts = order.split(counts)
    groups = tuple((expert, part) for expert, part in enumerate(parts[:num_experts]) if len(part))
    return Routes(experts=experts, num_experts=num_experts, groups=groups)


def experts_matmul_cpu(x: torch.Tensor, weights: ExpertWeights, routes: Routes, bias: torch.Tensor | None) -> torch.Tensor:
    """As `experts_matmul_ref`; the checks are `experts_matmul`'s."""
    each = routes.per_row(x)
    out = torch.zeros(routes.num_choices, weights.size[1], dtype=x.dtype, device=x.device)
    for expert, choices in routes.groups:
        part = multiply(x[choices // each if each > 1 else choices], weights, expert)
        out[choices] = part if bias is None else part.add_(bias[expert])
    return out


def combine_cpu(out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As `combine_ref`, summed in float32, in the order of the choices."""
    choices = out.view(*weights.shape, -1)
    total = torch.zeros(len(weights), out.shape[-1], dtype=torch.float32, device=out.device)
    for number in range(weights.shape[1]):
        total += choices[:, number].float() * weights[:, number, None]
    return total.to(out.dtype)


def pack_experts_for_cpu(weights: Int4Experts) -> PackedExperts:
    """Needs the given tensors no more, but for float32, where it is them."""
    packed = tuple(pack_for_cpu(*one) for one in zip(weights.codes, weights.scales, weights.zeros, strict=True))
    return PackedExperts(packed=packed, outputs=weights.size[1], inputs=weights.size[2])


def multiply(x: torch.Tensor, weights: ExpertWeights, expert: int) -> torch.Tensor:
    """x [n, K] -> [n, N] by one expert."""
    match weights:
        case DenseExperts():
            return F.linear(x, weights.weight[expert])
        case PackedExperts():
            return awq_matmul_cpu(x, weights.packed[expert])
        case Int4Experts():
            return PlainInt4(weights.codes[expert], weights.scales[expert], weights.zeros[expert]).matmul(x)
    step = max(1, BLOCK // weights.size[2])
    starts = range(0, weights.size[1], step)
    return torch.cat([F.linear(x, spread_out(weights, expert, slice(start, start + step), x.dtype)) for start in starts], dim=-1)


def spread_out(weights: Fp8Experts | Mxfp4Experts, expert: int, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows of an expert's weights, [n, K], rounded once."""
    codes, scales = weights.codes[expert, rows], weights.scales[expert, rows]
    if isinstance(weights, Mxfp4Experts):
        pairs = codes.int() + (scales.int() << 8)[..., None]  # a scale and a byte of two codes
        return _looked_up(_mxfp4_pairs(dtype, codes.device), pairs, dtype).view(len(codes), -1)
    numbers = codes.to(dtype) if codes.shape[1] % 2 else _looked_up(_e4m3_pairs(dtype, codes.device), _words(codes), dtype)
    numbers = numbers.view(codes.shape)
    if weights.block is None:
        return numbers.mul_(scales)
    first = weights.block - weights.offset  # inputs of the first block
    parts = numbers[:, :first], *numbers[:, first:].split(weights.block, dim=1)
    for part, scale in zip(parts, scales.split(1, dim=1), strict=False):
        part.mul_(scale)  # computed in float32, rounded once
    return numbers


def _words(codes: torch.Tensor) -> torch.Tensor:
    """[n, K] bytes -> [n, K/2], two in each."""
    return codes.contiguous().view(torch.uint16).int()


def _looked_up(table: torch.Tensor, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A table of two numbers a word at `places` -> all of them in a row, [2 n]."""
    return table.index_select(0, places.flatten()).view(dtype)


@lru_cache
def _mxfp4_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256 scales * 256 bytes of two codes], both numbers in a word."""
    levels, byte = torch.tensor(E2M1, dtype=torch.float64), torch.arange(256)
    pairs = torch.stack((levels[byte & 15], levels[byte >> 4]), dim=-1)
    scales = torch.exp2(torch.arange(256, dtype=torch.float64) - BIAS)
    return _in_words(scales[:, None, None] * pairs, dtype, device)


@lru_cache
def _e4m3_pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256 high bytes * 256 low bytes], both numbers in a word."""
    numbers = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    high, low = torch.meshgrid(numbers, numbers, indexing="ij")
    return _in_words(torch.stack((low, high), dim=-1), dtype, device)


def _in_words(pairs: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    numbers = pairs.to(dtype).reshape(-1, 2).contiguous()
    return numbers.view(WORDS[numbers.itemsize]).flatten().to(device)
