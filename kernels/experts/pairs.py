"""4-bit weights of experts put in `int4_pairs`' order for a GPU, once, when they have been loaded. Letters: types.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vlserve.kernels.experts.types import MXFP4_GROUP, Int4Experts, Mxfp4Experts, PairedExperts
from vlserve.kernels.group_sums.reference import INPUTS
from vlserve.kernels.int4_pairs import pack_for_gpu
from vlserve.kernels.int4_pairs.reference import OUTPUTS, takes_pairs, unpack_pairs, words_of
from vlserve.kernels.int4_pairs.types import PairedCodes


def pack_experts_for_gpu(weights: Int4Experts | Mxfp4Experts) -> Int4Experts | PairedExperts:
    """Codes that are computed with in float32, and groups of 16, stay as they are."""
    _, outputs, inputs = weights.size
    if isinstance(weights, Mxfp4Experts):
        words = torch.stack([words_of(_padded(codes.flatten(1))) for codes in weights.codes])
        return PairedExperts(words=words, scales=_scale_words(weights.scales), zeros=None, outputs=outputs, inputs=inputs)
    if not takes_pairs(inputs, weights.scales.shape[2], weights.scales.dtype):
        return weights
    packed = [pack_for_gpu(*one) for one in zip(weights.codes, weights.scales, weights.zeros, strict=True)]
    words, scales, zeros = (torch.stack([getattr(one, name) for one in packed]) for name in ("words", "scales", "zeros"))
    return PairedExperts(words=words, scales=scales, zeros=zeros, outputs=outputs, inputs=inputs)


def unpack_experts(packed: PairedExperts) -> Int4Experts | Mxfp4Experts:
    """What `pack_experts_for_gpu` was given."""
    if packed.zeros is not None:
        parts = [_of_expert(packed, packed.scales[number], packed.zeros[number], number) for number in range(len(packed.words))]
        codes, scales, zeros = (torch.stack(one) for one in zip(*parts, strict=True))
        return Int4Experts(codes=codes, scales=scales, zeros=zeros)
    experts, tiles, blocks = packed.words.shape[:3]
    scales = packed.scales.view(torch.uint8).view(experts, tiles, blocks, OUTPUTS, 4).permute(0, 1, 3, 2, 4)
    scales = scales.reshape(experts, tiles * OUTPUTS, -1)[:, : packed.outputs, : packed.inputs // MXFP4_GROUP].contiguous()
    nothing = torch.zeros(tiles, 1, OUTPUTS, dtype=torch.uint8, device=scales.device)
    codes = torch.stack([_of_expert(packed, nothing.half(), nothing, number)[0] for number in range(experts)])
    return Mxfp4Experts(codes=codes.unflatten(-1, (-1, MXFP4_GROUP // 2)), scales=scales)


def _of_expert(packed: PairedExperts, scales: torch.Tensor, zeros: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
    of = {"words": packed.words[number], "scales": scales, "zeros": zeros}
    return unpack_pairs(PairedCodes(**of, inputs=packed.inputs, outputs=packed.outputs))


def _padded(codes: torch.Tensor) -> torch.Tensor:
    """[N, K/2] -> [N', K'/2]; a code of zero is the number 0."""
    return F.pad(codes, (0, -codes.shape[1] % (INPUTS // 2), 0, -len(codes) % OUTPUTS))


def _scale_words(scales: torch.Tensor) -> torch.Tensor:
    """[E, N, K/32] -> [E, N'/64, K'/128, 64] int32."""
    each = INPUTS // MXFP4_GROUP
    padded = F.pad(scales, (0, -scales.shape[2] % each, 0, -scales.shape[1] % OUTPUTS))
    tiled = padded.unflatten(2, (-1, each)).unflatten(1, (-1, OUTPUTS)).transpose(2, 3)  # [E, tiles, blocks, 64, 4]
    return tiled.contiguous().view(torch.int32).squeeze(-1)
