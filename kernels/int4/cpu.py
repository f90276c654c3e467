"""`int4` on a CPU: weights put in the order of torch's 4-bit operator once, at load, and the product with them.

The operator is fast in bfloat16 alone and for few rows. It reads a weight anew for each of them, so that with many rows the
weights are spread out, a few outputs at a time, and multiplied by the dense product. float32 is for exact results:
there the codes stay as they are and every product is float32's. float16 is computed in bfloat16.
Letters as in reference.py; N' and K' are N and K rounded up to what the operator takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from vlserve.kernels.int4.reference import awq_dequantize_ref, unpack_codes

OPERATOR_ROWS = 128  # rows up to which the operator is faster than spreading the weights out
GROUPS = (256, 128, 64, 32)  # inputs of a group that the operator takes
OUTPUTS = 64  # a multiple of the outputs that the operator keeps together, on any CPU
BLOCK = 2**19  # weights that are spread out at once, so that they stay in the processor's cache


@dataclass(frozen=True, slots=True, eq=False)
class PlainInt4:
    """The codes as they are; multiplied in x's type."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def inputs(self) -> int:
        return 2 * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, K] -> [T, N]."""
        step = max(1, BLOCK // self.inputs)
        parts = zip(self.codes.split(step), self.scales.split(step), self.zeros.split(step), strict=True)
        return torch.cat([F.linear(x, awq_dequantize_ref(*part).to(x.dtype)) for part in parts], dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """How K inputs become K' in groups of `group`: zeros before, zeros after, or 16 of them after each 16 inputs."""

    group: int
    before: int = 0
    after: int = 0
    spread: bool = False

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., K']."""
        if self.spread:
            return F.pad(x.unflatten(-1, (-1, 16)), (0, 16)).flatten(-2)
        return F.pad(x, (self.before, self.after)) if self.before or self.after else x


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OperatorInt4:
    """In the operator's order: of 2 * `half` outputs the first ones in the low halves of bytes, the others in the high ones."""

    codes: torch.Tensor  # [N', K'/2] uint8
    scales_zeros: torch.Tensor  # [G', N', 2] bfloat16: the scale, and (8 - zero) * scale
    scales: torch.Tensor  # [G', N'] bfloat16
    zeros: torch.Tensor  # [G', N'] uint8
    inputs: int
    outputs: int
    padding: Padding
    half: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.codes, self.scales_zeros, self.scales, self.zeros))

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, K] -> [T, N]."""
        inputs = self.padding.pad(x.to(torch.bfloat16)).contiguous()
        if len(x) <= OPERATOR_ROWS:
            out = torch._weight_int4pack_mm_for_cpu(inputs, self.codes, self.padding.group, self.scales_zeros)
        else:
            step = OUTPUTS * max(1, BLOCK // (OUTPUTS * inputs.shape[1]))
            starts = range(0, len(self.codes), step)
            out = torch.cat([inputs @ self.dequantize(start, min(start + step, len(self.codes))) for start in starts], dim=-1)
        return out[:, : self.outputs].to(x.dtype)

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        """The weights of outputs start..stop, whole multiples of OUTPUTS: [K', stop - start] bfloat16."""
        half, width = self.half, 2 * self.codes.shape[1]
        packed = self.codes[start:stop].view(-1, width, half).transpose(0, 1)  # [K', blocks of outputs, half]
        weights = torch.empty(width, packed.shape[1], 2 * half, dtype=torch.bfloat16)
        weights[..., :half] = packed & 15
        weights[..., half:] = packed >> 4
        grouped = weights.view(len(self.scales), -1, stop - start)  # [G', K'/G', outputs]
        grouped.sub_(self.zeros[:, None, start:stop]).mul_(self.scales[:, None, start:stop])
        return weights.view(width, stop - start)


PackedInt4 = PlainInt4 | OperatorInt4


def pack_for_cpu(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> PackedInt4:
    """What `awq_matmul_cpu` multiplies with; it needs the given tensors no more, but for float32, where it is them."""
    half = operator_half()
    if scales.dtype == torch.float32 or half is None:
        return PlainInt4(codes, scales, zeros)
    outputs = -(-len(codes) // OUTPUTS) * OUTPUTS
    padding, scales, zeros = _padding(2 * codes.shape[1], scales, zeros)
    more = (0, 0, 0, outputs - len(codes))
    scales = F.pad(scales.to(torch.bfloat16), more).t().contiguous()
    zeros = F.pad(zeros, more).t().contiguous()
    offsets = (8 - zeros.float()) * scales.float()
    step = OUTPUTS * max(1, BLOCK // (OUTPUTS * 2 * codes.shape[1]))
    packed = []
    for part in codes.split(step):  # since the operator's way in takes four bytes a code
        levels = F.pad(padding.pad(unpack_codes(part)), (0, 0, 0, -len(part) % OUTPUTS))
        packed.append(torch._convert_weight_to_int4pack_for_cpu(levels.int(), 1))
    return OperatorInt4(
        codes=torch.cat(packed),
        scales_zeros=torch.stack((scales, offsets.to(torch.bfloat16)), dim=-1),
        scales=scales,
        zeros=zeros,
        inputs=2 * codes.shape[1],
        outputs=len(codes),
        padding=padding,
        half=half,
    )


def awq_matmul_cpu(x: torch.Tensor, packed: PackedInt4) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's type; raises ValueError when K is another."""
    if x.ndim != 2 or x.shape[1] != packed.inputs:
        raise ValueError(f"x is {tuple(x.shape)}, expected [T, {packed.inputs}]")
    return packed.matmul(x)


@lru_cache
def operator_half() -> int | None:
    """How many outputs the operator puts into the low halves of bytes before those in the high ones, found out by trial.

    The order depends on the CPU. None where it is neither of the two that are known.
    """
    outputs = torch.arange(OUTPUTS, dtype=torch.int32)[:, None].expand(OUTPUTS, 32)
    order = torch.zeros(2, outputs.numel() // 2, dtype=torch.int32)
    for shift in (0, 4):  # an output's number has six bits, and a code has room for four
        packed = torch._convert_weight_to_int4pack_for_cpu((outputs >> shift) & 15, 1).flatten().int()
        order = order + (torch.stack((packed & 15, packed >> 4)) << shift)
    for half in (32, 16):
        expected = torch.arange(OUTPUTS).view(-1, 1, 2, half).expand(-1, 32, -1, -1)  # [blocks, inputs, low and high, half]
        if torch.equal(order, expected.permute(2, 0, 1, 3).reshape(2, -1).int()):
            return half
    return None


def _padding(inputs: int, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[Padding, torch.Tensor, torch.Tensor]:
    """Groups that the operator takes, without another weight; with the scales and zeros of those groups."""
    count = scales.shape[1]
    size = inputs // count
    if count == 1:
        group = next((group for group in GROUPS if group <= inputs), GROUPS[-1])
        after = -inputs % group
        repeats = (inputs + after) // group
        return Padding(group=group, after=after), scales.repeat_interleave(repeats, 1), zeros.repeat_interleave(repeats, 1)
    if size >= GROUPS[-1]:
        group = min(size, GROUPS[0])
        repeats = size // group
        return Padding(group=group), scales.repeat_interleave(repeats, 1), zeros.repeat_interleave(repeats, 1)
    return _coarser(count, scales, zeros)


def _coarser(count: int, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[Padding, torch.Tensor, torch.Tensor]:
    """Of groups of 16 that come from larger ones, cut somewhere within the first, those larger ones."""
    for group in GROUPS:
        each = group // 16
        for before in range(each):
            after = -(count + before) % each
            places = torch.arange(-before, count + after).clamp(0, count - 1)  # what is cut off is like its neighbour
            found = [t[:, places].unflatten(1, (-1, each)) for t in (scales, zeros)]
            if all(bool((t == t[..., :1]).all()) for t in found):
                return Padding(group=group, before=16 * before, after=16 * after), found[0][..., 0], found[1][..., 0]
    return Padding(group=GROUPS[-1], spread=True), scales, zeros
