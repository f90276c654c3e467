"""Activation-aware weight quantisation, Lin et al. 2023 (arXiv 2306.00978): which inputs matter, and how far to clip.

Shapes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

import torch

from vlserve.quantize.activation_stats import ROWS_AT_ONCE, Inputs
from vlserve.quantize.rounding import Grouped, merge_rows, round_groups

RATIOS = [i / 20 for i in range(20)]
KEPT = [1 - i / 20 for i in range(1, 11)]  # shares of a group's range


def search_scales(
    weight: torch.Tensor,
    inputs: Inputs,
    group_size: int,
    dtype: torch.dtype,
    heads: tuple[int, int] | None = None,
    *,
    powers_of_two: bool = False,
) -> torch.Tensor:
    """The scale [K] of each input that makes the output's error smallest when weight * scale is rounded; 1 is among the tries.

    Args:
        weight: [N, K], of all linear layers that read these inputs, one below the other.
        heads: (KV heads, query heads of each): the inputs are query heads, and those of one KV head share their scales.
    """
    activation = inputs.mean_abs
    if heads is not None:
        activation = activation.unflatten(0, (*heads, -1)).mean(1, keepdim=True).expand(-1, heads[1], -1).flatten()
    best, least = torch.ones_like(activation), float("inf")
    for ratio in RATIOS:
        scales = activation.pow(ratio).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        if powers_of_two:
            scales = scales.log2().round().exp2()
        error = 0.0
        for rows in map(torch.Tensor.float, weight.split(ROWS_AT_ONCE)):
            rounded = round_groups(rows * scales, group_size, dtype).dense() / scales
            error += float(inputs.errors(rounded - rows).double().sum())
        if error < least:
            best, least = scales, error
    return best


def round_clipped(weight: torch.Tensor, inputs: Inputs, group_size: int, dtype: torch.dtype) -> Grouped:
    """Rounded with each group's range clipped where that makes the group's own error smaller.

    Groups are judged one by one, as in the paper; a row whose output gets worse by it, all groups together, is not clipped.
    """
    blocks = inputs.blocks(group_size)
    keep = torch.cat([_search_kept(rows, blocks, group_size, dtype) for rows in weight.split(ROWS_AT_ONCE)])
    plain, clipped = round_groups(weight, group_size, dtype), round_groups(weight, group_size, dtype, keep)
    is_better = inputs.errors(clipped.dense() - weight) < inputs.errors(plain.dense() - weight)
    return merge_rows(plain, clipped, is_better)


def _search_kept(weight: torch.Tensor, blocks: torch.Tensor, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """The share of each group's range to keep, [N, G]."""

    def errors(keep: float) -> torch.Tensor:
        change = round_groups(weight, group_size, dtype, keep).dense() - weight
        groups = change.unflatten(1, (-1, group_size)).transpose(0, 1)  # [G, N, group]
        return ((groups @ blocks) * groups).sum(-1).T

    least = errors(1.0)
    best = torch.ones_like(least)
    for keep in KEPT:
        error = errors(keep)
        best = torch.where(error < least, keep, best)
        least = torch.minimum(least, error)
    return best
