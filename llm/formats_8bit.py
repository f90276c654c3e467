"""Eight bits a weight: FP8 E4M3 and int8, with scales for rows or for blocks.

FP8 weights are multiplied in the compute type. On the CPU they are converted to it once, at the end of loading: converting
them at each use takes ten times as long as the product of a decoding step itself. On a GPU they stay as they are and are
converted at each use, since it is for memory that they were chosen.
int8 weights are multiplied with activations that are rounded to int8 too, with a scale for each token (W8A8), which is what they
were made for and faster on the CPU as well; float32, the type for exact comparisons, converts them at the end of loading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.llm.formats import ReadSlot, Slot
from vlserve.llm.quantisation import padded_groups
from vlserve.llm.tensor_parallel import Span

WEIGHT = "weight"
ROWS_AT_ONCE = 256  # that are converted by way of float32
CUDA_ROWS, CUDA_MULTIPLE = 17, 8  # torch._int_mm on CUDA: the fewest rows, and what sizes must be multiples of


class EightBitFormat(nn.Module, ABC):
    """codes [N, K] of one byte; scales float32 [N, blocks of inputs].

    Args:
        scale: what the checkpoint calls the scales. scale_shapes: their shape, by projection.
        block: (outputs, inputs) that share a scale; None for scales of rows, or one for all.
    """

    stored_dtype: torch.dtype

    def __init__(
        self,
        in_span: Span,
        in_features: int,
        outputs: dict[str, tuple[Span, int]],
        *,
        scale: str,
        scale_shapes: dict[str, tuple[int, ...]],
        block: tuple[int, int] | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_span, self.in_features, self.outputs = in_span, in_features, outputs
        self.scale, self.scale_shapes, self.block, self.dtype = scale, scale_shapes, block, dtype
        rows = sum(span.size for span, _ in outputs.values())
        blocks = 1 if block is None else padded_groups(in_span.size, block[1]) // block[1]
        self.codes = nn.Parameter(torch.empty(rows, in_span.size, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(rows, blocks, dtype=torch.float32), requires_grad=False)
        self.weight: nn.Parameter | None = None  # in the compute type, where the codes are not used

    def targets(self, prefix: str) -> Iterator[tuple[str, Slot]]:
        first = 0
        for name, (span, size) in self.outputs.items():
            codes, scales = (tensor.data[first : first + span.size] for tensor in (self.codes, self.scales))
            stored = Slot(codes.view(self.stored_dtype), (size, self.in_features), {0: span, 1: self.in_span})
            yield f"{prefix}{name}.{WEIGHT}", stored
            reader = _Scales(self, span, size, scales)
            yield f"{prefix}{name}.{self.scale}", ReadSlot(scales, self.scale_shapes[name], {}, reader.read)
            first += span.size

    def dequantise(self) -> torch.Tensor:
        """[N, K] in the compute type."""
        out = torch.empty(self.codes.shape, dtype=self.dtype, device=self.codes.device)
        stored = self.codes.data.view(self.stored_dtype)
        for rows in (slice(first, first + ROWS_AT_ONCE) for first in range(0, len(out), ROWS_AT_ONCE)):
            part, scales = stored[rows].float(), self.scales[rows]
            if self.block is None:
                part.mul_(scales)
            else:
                offset = self.in_span.start % self.block[1]
                for column in range(scales.shape[1]):
                    begin, end = (max(0, place * self.block[1] - offset) for place in (column, column + 1))
                    part[:, begin:end].mul_(scales[:, column : column + 1])
            out[rows] = part
        return out

    def empty_sums(self, x: torch.Tensor) -> None:
        """These products take nothing else."""

    @abstractmethod
    def finish(self) -> None:
        """Called once, when all weights are there."""

    def convert(self) -> None:
        """Keep the weights in the compute type, and no codes."""
        self.weight = nn.Parameter(self.dequantise(), requires_grad=False)
        del self.codes, self.scales


class Fp8Format(EightBitFormat):
    stored_dtype = torch.float8_e4m3fn

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        return F.linear(x, self.dequantise() if self.weight is None else self.weight, bias)

    def finish(self) -> None:
        if self.codes.device.type == "cpu":
            self.convert()


class Int8Format(EightBitFormat):
    stored_dtype = torch.int8

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        if self.weight is not None:
            return F.linear(x, self.weight, bias)
        scales = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (x.float() / scales).round_().to(torch.int8)
        y = int_matmul(codes, self.codes).float().mul_(scales).mul_(self.scales.t())
        return (y if bias is None else y + bias).to(x.dtype)

    def finish(self) -> None:
        can_multiply = all(size % CUDA_MULTIPLE == 0 for size in self.codes.shape) or self.codes.device.type == "cpu"
        if self.dtype == torch.float32 or not can_multiply:
            self.convert()
        elif self.codes.device.type == "cpu":  # the order in which the CPU multiplies more than a few rows faster
            self.codes.data = self.codes.data.t().contiguous().t()


class _Scales:
    """Fills scales [N, blocks] of a rank's rows from a checkpoint's, whatever they are for."""

    def __init__(self, of: EightBitFormat, span: Span, size: int, to: torch.Tensor) -> None:
        self.of, self.span, self.size, self.to = of, span, size, to

    def read(self, stored: Any) -> int:
        self.to.zero_()
        rows, inputs = self.span, self.of.in_span
        if rows.start == rows.stop or inputs.start == inputs.stop:
            return 0
        to = self.to[: rows.stop - rows.start]
        shape = tuple(stored.get_shape())
        if self.of.block is not None:
            height, width = self.of.block
            first = rows.start // height
            part = stored[first : -(-rows.stop // height), inputs.start // width : -(-inputs.stop // width)]
            of_rows = torch.arange(rows.start, rows.stop) // height - first
            to[:, : part.shape[1]].copy_(part[of_rows])
        elif shape in ((), (1,), (1, 1)) and self.size != 1:
            part = stored[...]
            to.fill_(float(part))
        else:
            part = stored[rows.start : rows.stop]
            to.copy_(part.reshape(-1, 1))
        return int(part.nbytes)


def int_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 x [T, K] and weight [N, K] -> int32 [T, N]."""
    rows = len(x)
    if x.is_cuda and rows < CUDA_ROWS:
        x = F.pad(x, (0, 0, 0, CUDA_ROWS - rows))
    return torch._int_mm(x, weight.t())[:rows]
