"""4-bit weights put in pairs for a GPU, and the product with them. Letters, and the order: reference.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlserve.kernels.group_sums import group_sums
from vlserve.kernels.group_sums.reference import INPUTS, empty_sums, groups_of
from vlserve.kernels.int4.reference import awq_matmul_ref
from vlserve.kernels.int4_pairs.reference import OUTPUTS, SCALE_ORDER, ZERO_ORDER, ordered, takes_pairs, unpack_pairs, words_of
from vlserve.kernels.int4_pairs.types import PairedCodes
from vlserve.kernels.with_triton import runs_triton

ROWS = 128  # up to here the weights are taken apart on the way; above, spread out for torch's product
AT_ONCE = 2**24  # weights that are put in order together, so that loading takes little memory beside the weights


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedWeights(PairedCodes):
    """A layer's weights with what is done with them."""

    def empty_sums(self, x: torch.Tensor) -> torch.Tensor:
        """Room for `group_sums` of inputs for as many tokens as x has, on its device."""
        return empty_sums(x, self.padded_inputs, self.group)

    def launch_all(self) -> None:
        """All that products of any number of rows launch, with zeros, so that it has been compiled; on a GPU with Triton."""
        from vlserve.kernels.int4_pairs.triton import launch_all, pairs_dequantize_triton

        x = self.scales.new_zeros(1, self.padded_inputs)
        launch_all(x, group_sums(x, self.empty_sums(x)), self)
        pairs_dequantize_triton(self)

    def matmul(self, x: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, K] -> [T, N], summed in float32; raises ValueError when K, the type of x or the groups of `sums` are others.

        Args:
            sums: `group_sums` of x, where what made x has written them; products of more than 128 rows use none.
        """
        if x.ndim != 2 or x.shape[1] != self.inputs or x.dtype != self.scales.dtype:
            raise ValueError(f"x is {tuple(x.shape)} {x.dtype}, expected [T, {self.inputs}] {self.scales.dtype}")
        if not runs_triton(x):
            return awq_matmul_ref(x, *unpack_pairs(self))
        from vlserve.kernels.int4_pairs.triton import pairs_dequantize_triton, pairs_matmul_triton

        if self.padded_inputs != self.inputs:
            x = F.pad(x, (0, self.padded_inputs - self.inputs))
        if len(x) > ROWS:
            return F.linear(x, pairs_dequantize_triton(self))
        if sums is None:
            sums = group_sums(x, self.empty_sums(x))
        elif groups_of(sums, x) != max(1, INPUTS // self.group):
            raise ValueError(f"the sums are of {groups_of(sums, x)} groups in {INPUTS} inputs, but a group has {self.group}")
        return pairs_matmul_triton(x, sums, self)


def pack_for_gpu(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> PairedWeights:
    """codes [N, K/2], scales and zeros [N, G], as `int4` has them; raises ValueError where `takes_pairs` is false."""
    outputs, inputs, groups = len(codes), 2 * codes.shape[1], scales.shape[1]
    if not takes_pairs(inputs, groups, scales.dtype):
        raise ValueError(
            f"{inputs} inputs in {groups} groups of {scales.dtype}; expected groups of 32, 64 or whole 128, in 16 bits"
        )
    tiles, blocks = -(-outputs // OUTPUTS), -(-inputs // INPUTS)
    padded_groups = 1 if groups == 1 else blocks * INPUTS // (inputs // groups)
    words = torch.empty(tiles, blocks, OUTPUTS, INPUTS // 8, dtype=torch.int32, device=codes.device)
    step = max(1, AT_ONCE // (OUTPUTS * INPUTS * blocks))
    for rows, to in zip(codes.split(step * OUTPUTS), words.split(step), strict=True):
        to.copy_(words_of(F.pad(rows, (0, (blocks * INPUTS - inputs) // 2, 0, len(to) * OUTPUTS - len(rows)))))
    more = (0, padded_groups - groups, 0, tiles * OUTPUTS - outputs)
    return PairedWeights(
        words=words,
        scales=ordered(F.pad(scales, more), SCALE_ORDER),
        zeros=ordered(F.pad(zeros, more), ZERO_ORDER),
        inputs=inputs,
        outputs=outputs,
    )
