"""The sums of activations that `int4_pairs`' product takes magic numbers and zero points off with.

The kernel that makes the activations writes them, where it is given room, and otherwise one of their own does. Both add up the
numbers as they are stored, after rounding.
Shapes: T tokens, K inputs in B blocks of 128, of which the last need not be full, S sums of a block: for each group in it one of
the inputs and, with float16, one of the inputs times the magic numbers that their planes' codes are added to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

INPUTS = 128  # of a block
MAGIC = (1024.0, 64.0, 1024.0, 64.0)  # of a block's four planes with float16; what comes of odd ones is divided by 16


def empty_sums(x: torch.Tensor, inputs: int, group: int) -> torch.Tensor:
    """Room for the sums of `inputs` in groups of `group`, for as many tokens as x has, of its type: [B, S, T] float32."""
    groups, kinds = max(1, INPUTS // group), _kinds(x.dtype)
    return torch.empty((-(-inputs // INPUTS), groups * kinds, len(x)), dtype=torch.float32, device=x.device)


def group_sums_ref(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x [T, K] -> out [B, S, T], which is returned."""
    groups = groups_of(out, x)
    blocks = F.pad(x.float(), (0, -x.shape[1] % INPUTS)).unflatten(1, (-1, groups, 4 // groups, 32))
    kinds = [blocks.sum((3, 4))]
    if x.dtype == torch.float16:
        kinds.append((blocks.sum(4) * x.new_tensor(MAGIC, dtype=torch.float32).view(groups, -1)).sum(3))
    return out.copy_(torch.stack(kinds, 3).flatten(2).permute(1, 2, 0))


def groups_of(sums: torch.Tensor, x: torch.Tensor) -> int:
    """How many groups of a block have sums of their own; raises ValueError when there is no room for those of x [T, K]."""
    kinds = _kinds(x.dtype)
    groups = sums.shape[1] // kinds
    shape = -(-x.shape[1] // INPUTS), groups * kinds, len(x)
    if groups not in (1, 2, 4) or sums.shape != shape or sums.dtype != torch.float32:
        raise ValueError(
            f"the sums are {tuple(sums.shape)} {sums.dtype}, which is no room for those of {tuple(x.shape)} {x.dtype}"
        )
    return groups


def _kinds(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.float16 else 1
