"""Weights in few bits: groups of 4-bit integers with a scale and a zero point, and rows of 8-bit floats with a scale.

Codes are always chosen for the scale as it is stored, so its own rounding costs nothing. Shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from vlserve.llm.stored_names import Ranges

LEVELS = 15  # the largest 4-bit code
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = k // (K / G)."""

    codes: torch.Tensor  # uint8 [N, K], 0..15
    scales: torch.Tensor  # [N, G] in the type that is stored
    zeros: torch.Tensor  # uint8 [N, G], 0..15

    def dense(self) -> torch.Tensor:
        """float32 [N, K]."""
        steps = self.codes.unflatten(1, (self.scales.shape[1], -1)).float() - self.zeros.float().unsqueeze(-1)
        return (steps * self.scales.float().unsqueeze(-1)).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """w[n, k] = codes[n, k] * scales[n, 0]."""

    codes: torch.Tensor  # float8_e4m3fn [N, K]
    scales: torch.Tensor  # [N, 1] in the type that is stored

    def dense(self) -> torch.Tensor:
        """float32 [N, K]."""
        return self.codes.float() * self.scales.float()


Rounded = Grouped | Rows


def round_groups(weight: torch.Tensor, group_size: int, dtype: torch.dtype, keep: torch.Tensor | float = 1.0) -> Grouped:
    """To nearest.

    Args:
        weight: float32 [N, K]. dtype: of the scales.
        keep: [N, G], or one number: the share of each group's range that is kept; weights beyond it are clipped.
    """
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1).clamp(max=0) * keep, groups.amax(-1).clamp(min=0) * keep
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    scales = ((high - low) / LEVELS).to(dtype).clamp(min=smallest)
    steps = scales.float()
    zeros = (-low / steps).round().clamp(0, LEVELS)
    codes = ((groups / steps.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, LEVELS)
    return Grouped(codes.to(torch.uint8).flatten(1), scales, zeros.to(torch.uint8))


def round_rows(weight: torch.Tensor, dtype: torch.dtype) -> Rows:
    """To the nearest 8-bit floats, a scale for each output; weight float32 [N, K]."""
    largest = torch.finfo(FP8).max
    peaks = weight.abs().amax(1, keepdim=True)
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    scales = (peaks / largest).to(dtype).clamp(min=smallest)
    return Rows((weight / scales.float()).clamp(-largest, largest).to(FP8), scales)


def merge_rows(one: Grouped, other: Grouped, take_other: torch.Tensor) -> Grouped:
    """Each output from `one`, or from `other` where `take_other` [N] says so."""
    rows = take_other.unsqueeze(1)
    return Grouped(
        torch.where(rows, other.codes, one.codes),
        torch.where(rows, other.scales, one.scales),
        torch.where(rows, other.zeros, one.zeros),
    )


def join_rounded(parts: Sequence[tuple[Rounded, Ranges]]) -> Rounded:
    """Several projections as the one weight that they are stored as; `Ranges` are each one's outputs there."""
    kind = type(parts[0][0])
    return kind(*(join_rows([(getattr(one, field.name), ranges) for one, ranges in parts]) for field in fields(kind)))


def join_rows(parts: Sequence[tuple[torch.Tensor, Ranges]]) -> torch.Tensor:
    """Tensors of N outputs, each in its ranges of the outputs of all; one without ranges is all."""
    first = parts[0][0]
    if not parts[0][1]:
        return first
    kind = torch.uint8 if first.dtype == FP8 else first.dtype  # torch cannot write some rows of such floats
    whole = torch.empty(sum(len(tensor) for tensor, _ in parts), *first.shape[1:], dtype=kind, device=first.device)
    for tensor, ranges in parts:
        rows = torch.cat([torch.arange(start, stop, device=first.device) for start, stop in ranges])
        whole[rows] = tensor.view(kind)
    return whole.view(first.dtype)
