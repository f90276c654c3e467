"""`awq` on a GPU: codes put once, at load, in the order in which tensor cores take weights, and the product with them.

Two neighbouring inputs lie 16 bits apart in a word, so that one logic instruction makes a register of two numbers of them: a code
put into the lowest bits of a 16-bit number's fraction is that number plus the code.
Letters as in `awq`; K' and N' are K and N rounded up to blocks of 128 inputs and tiles of 64 outputs, G' the groups of K'. Input
k = 128 b + 32 i + 8 q + 2 c + h of output n = 64 t + r is at bit 4 i + 16 h of words[t, b, r, 4 c + q]: what a program reads at
once is in one piece, and what a thread of it multiplies is in 128 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlserve.kernels.awq import awq_matmul_ref
from vlserve.kernels.group_sums import group_sums
from vlserve.kernels.group_sums.reference import INPUTS, empty_sums, groups_of
from vlserve.kernels.with_triton import runs_triton

OUTPUTS = 64  # of a tile
FINER = (32, 64)  # inputs of a group, when a block has several of them
ROWS = 128  # up to here the weights are taken apart on the way; above, spread out for torch's product
AT_ONCE = 2**24  # weights that are put in order together, so that loading takes little memory beside the weights
# outputs 32 u + 16 v + 8 h + r of a tile, as the axes (u, v, h, r): two scales to 32 bits, four zeros
SCALE_ORDER, ZERO_ORDER = (0, 1, 3, 2), (1, 3, 0, 2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedWeights:
    """A layer's weights; padding has scale 0, or inputs of 0."""

    words: torch.Tensor  # [N'/64, K'/128, 64, 16] int32
    scales: torch.Tensor  # [N'/64, G', 64] float16 or bfloat16, by SCALE_ORDER
    zeros: torch.Tensor  # [N'/64, G', 64] uint8, by ZERO_ORDER
    inputs: int
    outputs: int

    @property
    def padded_inputs(self) -> int:
        return self.words.shape[1] * INPUTS

    @property
    def group(self) -> int:
        """Inputs, of K', that share a scale."""
        return self.padded_inputs // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + self.zeros.nbytes

    def empty_sums(self, x: torch.Tensor) -> torch.Tensor:
        """Room for `group_sums` of inputs for as many tokens as x has, on its device."""
        return empty_sums(x, self.padded_inputs, self.group)

    def matmul(self, x: torch.Tensor, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, K] -> [T, N], summed in float32; raises ValueError when K, the type of x or the groups of `sums` are others.

        Args:
            sums: `group_sums` of x, where what made x has written them; products of more than 128 rows use none.
        """
        if x.ndim != 2 or x.shape[1] != self.inputs or x.dtype != self.scales.dtype:
            raise ValueError(f"x is {tuple(x.shape)} {x.dtype}, expected [T, {self.inputs}] {self.scales.dtype}")
        if not runs_triton(x):
            return awq_matmul_ref(x, *unpack_pairs(self))
        from vlserve.kernels.awq_pairs_triton import pairs_dequantize_triton, pairs_matmul_triton

        if self.padded_inputs != self.inputs:
            x = F.pad(x, (0, self.padded_inputs - self.inputs))
        if len(x) > ROWS:
            return F.linear(x, pairs_dequantize_triton(self))
        if sums is None:
            sums = group_sums(x, self.empty_sums(x))
        elif groups_of(sums, x) != max(1, INPUTS // self.group):
            raise ValueError(f"the sums are of {groups_of(sums, x)} groups in {INPUTS} inputs, but a group has {self.group}")
        return pairs_matmul_triton(x, sums, self)


def takes_pairs(inputs: int, groups: int, dtype: torch.dtype) -> bool:
    """Whether weights with so many inputs in so many groups, computed with in `dtype`, can be put in pairs."""
    is_taken = groups == 1 or (groups > 1 and (inputs // groups in FINER or inputs // groups % INPUTS == 0))
    return is_taken and dtype in (torch.float16, torch.bfloat16)


def pack_for_gpu(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> PairedWeights:
    """codes [N, K/2], scales and zeros [N, G], as `awq` has them; raises ValueError where `takes_pairs` is false."""
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
        to.copy_(_words(F.pad(rows, (0, (blocks * INPUTS - inputs) // 2, 0, len(to) * OUTPUTS - len(rows)))))
    more = (0, padded_groups - groups, 0, tiles * OUTPUTS - outputs)
    return PairedWeights(
        words=words,
        scales=_ordered(F.pad(scales, more), SCALE_ORDER),
        zeros=_ordered(F.pad(zeros, more), ZERO_ORDER),
        inputs=inputs,
        outputs=outputs,
    )


def unpack_pairs(packed: PairedWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes, scales and zeros that `pack_for_gpu` was given."""
    tiles, blocks = packed.words.shape[:2]
    shifts = torch.arange(0, 32, 4, device=packed.words.device).view(2, 4)  # [h, i]
    nibbles = packed.words.view(tiles, blocks, OUTPUTS, 4, 4, 1, 1) >> shifts & 15  # [t, b, r, c, q, h, i]
    low, high = nibbles.to(torch.uint8).unbind(5)
    codes = (low | high << 4).permute(0, 2, 1, 5, 4, 3).reshape(tiles * OUTPUTS, -1)
    groups = 1 if packed.group == packed.padded_inputs else packed.inputs // packed.group
    scales, zeros = _restored(packed.scales, SCALE_ORDER), _restored(packed.zeros, ZERO_ORDER)
    kept = slice(packed.outputs)
    return codes[kept, : packed.inputs // 2].contiguous(), scales[kept, :groups].contiguous(), zeros[kept, :groups].contiguous()


def _words(codes: torch.Tensor) -> torch.Tensor:
    """[64 t, K'/2] bytes of two inputs -> [t, b, 64, 16]."""
    planes = codes.view(len(codes) // OUTPUTS, OUTPUTS, codes.shape[1] // 64, 4, 4, 4).unbind(3)  # i of [t, r, b, q, c]
    words = torch.zeros(planes[0].shape, dtype=torch.int32, device=codes.device)
    for i, plane in enumerate(planes):
        words |= (plane & 15).int() << 4 * i
        words |= (plane >> 4).int() << 4 * i + 16
    return words.permute(0, 2, 1, 4, 3).flatten(3)


def _ordered(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[N', G'] -> [N'/64, G', 64]."""
    tiles = values.unflatten(0, (len(values) // OUTPUTS, 2, 2, 2, 8)).permute(0, 5, *(1 + axis for axis in order))
    return tiles.flatten(2).contiguous()


def _restored(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[N'/64, G', 64] -> [N', G']."""
    sizes = [(2, 2, 2, 8)[axis] for axis in order]
    back = sorted(range(4), key=lambda place: order[place])
    return values.unflatten(2, sizes).permute(0, *(2 + place for place in back), 1).flatten(0, 4)
