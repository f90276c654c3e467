"""GPTQ, Frantar et al. 2022 (arXiv 2210.17323): columns are rounded one after another, and those still to come make up
for the error, by the inverse of the inputs' second moments. Columns keep their order. Shapes: N outputs, K inputs.
"""

from __future__ import annotations

import torch

from vlserve.quantize.activation_stats import Inputs
from vlserve.quantize.rounding import LEVELS, Grouped, merge_rows, round_groups

DAMPING = (0.01, 0.1, 1.0)  # shares of the mean moment that are added to the diagonal; the next one where the last fails


def round_gptq(weight: torch.Tensor, inputs: Inputs, group_size: int, dtype: torch.dtype) -> Grouped:
    """weight float32 [N, K]; a row whose output rounding to nearest serves better is rounded so."""
    factor = _inverse_factor(inputs.moments)
    left = weight.clone()
    codes, scales, zeros = [], [], []
    for start in range(0, weight.shape[1], group_size):
        stop = start + group_size
        block, errors = left[:, start:stop].clone(), torch.empty_like(left[:, start:stop])
        grid = round_groups(block, group_size, dtype)  # of what is left of the weights now
        steps, zero = grid.scales[:, 0].float(), grid.zeros[:, 0].float()
        for i in range(group_size):
            row = factor[start + i, start + i : stop]
            code = ((block[:, i] / steps).round() + zero).clamp(0, LEVELS)
            errors[:, i] = (block[:, i] - (code - zero) * steps) / row[0]
            block[:, i:] -= errors[:, i : i + 1] * row
            codes.append(code.to(torch.uint8))
        left[:, stop:] -= errors @ factor[start:stop, stop:]
        scales.append(grid.scales)
        zeros.append(grid.zeros)
    found = Grouped(torch.stack(codes, dim=1), torch.cat(scales, dim=1), torch.cat(zeros, dim=1))
    nearest = round_groups(weight, group_size, dtype)
    is_better = inputs.errors(nearest.dense() - weight) < inputs.errors(found.dense() - weight)
    return merge_rows(found, nearest, is_better)


def _inverse_factor(moments: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the damped moments' inverse; raises ValueError when there is none."""
    mean = moments.diagonal().mean().clamp(min=1e-10)
    for damping in DAMPING:
        damped = moments + torch.diag_embed((damping * mean).expand(len(moments)))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed:
            return upper
    raise ValueError("the inputs' moments have no Cholesky factor, not even damped; calibrate on other samples")
