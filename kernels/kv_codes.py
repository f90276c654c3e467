"""Keys and values in eight bits, with a scale for each token and KV head.

A number is `code * scale`, where the scale is the largest magnitude of the head's D numbers over the largest code: 127 for
int8, 448 for FP8 E4M3. It is rounded to bfloat16 before the codes are made, so that the codes make up for it: two bytes with
float32's range, which neither outliers nor tiny values leave. A token that is all zeros has scale 0. NaN and infinity make the
scale so, and with it the token. Shapes: N blocks of S slots, HK KV heads, D head_dim, n blocks picked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}  # by the type of the codes; uint8 holds the bits of E4M3
CODE_TYPES = {"int8": torch.int8, "fp8": torch.uint8}
SCALE_TYPE = torch.bfloat16
TINY = 2.0**-120  # scales below are 0, so that no product is subnormal
AT_ONCE = 2**17  # numbers: what is between codes and result stays in the processor's cache


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedBlocks:
    """Keys or values of one layer; stands where a tensor [N, S, HK, D] of the computation type stands otherwise."""

    codes: torch.Tensor  # [N, S, HK, D] int8, or uint8 with the bits of E4M3
    scales: torch.Tensor  # [N, S, HK] bfloat16

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


Blocks = torch.Tensor | QuantizedBlocks


def quantize_ref(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] -> codes [..., D] of type `kind`, scales [...]; the quotients in float64."""
    scales = (x.abs().amax(-1).float() / LARGEST[kind]).to(SCALE_TYPE)
    scales = torch.where(scales < TINY, 0, scales)
    quotients = x.double() / torch.where(scales == 0, 1, scales).double()[..., None]
    if kind is torch.int8:
        return quotients.round().to(torch.int8), scales
    exponents = quotients.abs().clamp_min(2.0**-6).log2().floor()  # below 2^-6 E4M3 is subnormal: even steps
    steps = torch.exp2(exponents - 3)  # three bits of mantissa
    return ((quotients / steps).round() * steps).to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantize_ref(blocks: QuantizedBlocks, dtype: torch.dtype) -> torch.Tensor:
    """Every block as numbers [N, S, HK, D] of `dtype`."""
    codes = blocks.codes.view(torch.float8_e4m3fn) if blocks.codes.dtype is torch.uint8 else blocks.codes
    return codes.to(dtype) * blocks.scales.to(dtype)[..., None]


def quantize(x: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_ref`, with quotients in float32."""
    x = x.float()
    scales = (x.abs().amax(-1) / LARGEST[kind]).to(SCALE_TYPE)
    scales.masked_fill_(scales < TINY, 0)
    quotients = x / scales.masked_fill(scales == 0, 1).float()[..., None]  # at most 127.25 and 448.9: no clamping
    if kind is torch.int8:
        return quotients.round_().to(torch.int8), scales
    return quotients.to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantize(blocks: QuantizedBlocks, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The blocks `index` [n] as numbers [n, S, HK, D] of `dtype`, each rounded once."""
    out = torch.empty((len(index), *blocks.shape[1:]), dtype=dtype, device=index.device)
    step = max(1, AT_ONCE // blocks.shape[1:].numel())
    for part, target in zip(index.split(step), out.split(step), strict=True):
        scales = blocks.scales.index_select(0, part).float()[..., None]
        if blocks.codes.dtype is torch.int8:
            target.copy_(blocks.codes.index_select(0, part).float().mul_(scales))
        else:
            target.copy_(_float_of_e4m3(blocks.codes.index_select(0, part)).mul_(scales))
    return out


def _float_of_e4m3(bits: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32: exponent and mantissa at their places in float16 are the number over 256. torch's own conversion
    on the CPU goes number by number and takes fifty times as long."""
    halves = bits.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(-0x4001).view(torch.float16)
    return halves.float().mul_(256)
