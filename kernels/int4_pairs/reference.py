"""`int4` on a GPU: codes put once, at load, in the order in which tensor cores take weights; which order, and the way back.

Two neighbouring inputs lie 16 bits apart in a word, so that one logic instruction makes a register of two numbers of them: a code
put into the lowest bits of a 16-bit number's fraction is that number plus the code.
Letters as in int4/reference.py; K' and N' are K and N rounded up to blocks of 128 inputs and tiles of 64 outputs, G' the groups
of K'. Input k = 128 b + 32 i + 8 q + 2 c + h of output n = 64 t + r is at bit 4 i + 16 h of words[t, b, r, 4 c + q]: what a
program reads at once is in one piece, and what a thread of it multiplies is in 128 bits.
"""

from __future__ import annotations

import torch

from vlserve.kernels.group_sums.reference import INPUTS
from vlserve.kernels.int4_pairs.types import PairedCodes

OUTPUTS = 64  # of a tile
FINER = (32, 64)  # inputs of a group, when a block has several of them
# outputs 32 u + 16 v + 8 h + r of a tile, as the axes (u, v, h, r): two scales to 32 bits, four zeros
SCALE_ORDER, ZERO_ORDER = (0, 1, 3, 2), (1, 3, 0, 2)


def takes_pairs(inputs: int, groups: int, dtype: torch.dtype) -> bool:
    """Whether weights with so many inputs in so many groups, computed with in `dtype`, can be put in pairs."""
    is_taken = groups == 1 or (groups > 1 and (inputs // groups in FINER or inputs // groups % INPUTS == 0))
    return is_taken and dtype in (torch.float16, torch.bfloat16)


def unpack_pairs(packed: PairedCodes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


def words_of(codes: torch.Tensor) -> torch.Tensor:
    """[64 t, K'/2] bytes of two inputs -> [t, b, 64, 16]."""
    planes = codes.view(len(codes) // OUTPUTS, OUTPUTS, codes.shape[1] // 64, 4, 4, 4).unbind(3)  # i of [t, r, b, q, c]
    words = torch.zeros(planes[0].shape, dtype=torch.int32, device=codes.device)
    for i, plane in enumerate(planes):
        words |= (plane & 15).int() << 4 * i
        words |= (plane >> 4).int() << 4 * i + 16
    return words.permute(0, 2, 1, 4, 3).flatten(3)


def ordered(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[N', G'] -> [N'/64, G', 64]."""
    tiles = values.unflatten(0, (len(values) // OUTPUTS, 2, 2, 2, 8)).permute(0, 5, *(1 + axis for axis in order))
    return tiles.flatten(2).contiguous()


def _restored(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[N'/64, G', 64] -> [N', G']."""
    sizes = [(2, 2, 2, 8)[axis] for axis in order]
    back = sorted(range(4), key=lambda place: order[place])
    return values.unflatten(2, sizes).permute(0, *(2 + place for place in back), 1).flatten(0, 4)
