"""Four-bit codes in groups of inputs that share a scale and a zero point, from any checkpoint layout, split at any place.

w[n, k] = (code - zero) * scale. A rank keeps its inputs in whole groups: `front` places before the first input and some behind
the last make up for a share that begins or ends within a group; the activations get zeros there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.kernels.int4 import awq_matmul, launch_all
from vlserve.kernels.int4.cpu import PackedInt4, pack_for_cpu
from vlserve.kernels.int4_pairs import ROWS, PairedWeights, pack_for_gpu
from vlserve.kernels.int4_pairs.reference import takes_pairs
from vlserve.kernels.with_triton import runs_triton
from vlserve.llm.formats import ReadSlot, Slot
from vlserve.llm.int4_packing import MIDDLE, Layout, pack_pairs, stored_zeros_are_less
from vlserve.llm.quantisation import grouped
from vlserve.llm.tensor_parallel import Span


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int4Storage:
    """How a checkpoint stores a layer: `group` inputs share a scale, None for all of a row.

    `has_zeros`: zero points are stored; `zeros_are_less`: by one, None where their values tell; `order`: the inputs group by
    group where they are not so by themselves.
    """

    layout: Layout
    group: int | None
    has_zeros: bool = True
    zeros_are_less: bool | None = False
    order: torch.Tensor | None = None


class GroupedInt4Format(nn.Module):
    """codes [N, K/2], two to a byte, the even input in the lower half; scales and zeros [N, K/g]."""

    def __init__(
        self, in_span: Span, in_features: int, outputs: dict[str, tuple[Span, int]], form: Int4Storage, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_span, self.in_features, self.outputs, self.form = in_span, in_features, outputs, form
        self.size, self.group = grouped(in_span.size, form.group)
        self.front = in_span.start % self.group if form.group is not None and in_span.stop > in_span.start else 0
        rows, groups = sum(span.size for span, _ in outputs.values()), self.size // self.group
        self.codes = _parameter(rows, self.size // 2, torch.uint8)
        self.scales = _parameter(rows, groups, dtype)
        self.zeros = _parameter(rows, groups, torch.uint8)
        self.order = None if form.order is None else _parameter(in_features, None, torch.int32)
        self.packed: PackedInt4 | PairedWeights | None = None  # once the weights are there

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None, sums: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.size != x.shape[-1]:
            x = F.pad(x, (self.front, self.size - self.front - x.shape[-1]))
        packed = self.packed
        if packed is None:
            out = awq_matmul(x, self.codes, self.scales, self.zeros)
        else:
            out = packed.matmul(x, sums) if isinstance(packed, PairedWeights) else packed.matmul(x)
        return out if bias is None else out + bias

    def empty_sums(self, x: torch.Tensor) -> torch.Tensor | None:
        """Room for the sums that weights in pairs take, for products that do not spread the weights out."""
        packed, is_rearranged = self.packed, self.order is not None or self.size != self.in_span.size
        return packed.empty_sums(x) if isinstance(packed, PairedWeights) and len(x) <= ROWS and not is_rearranged else None

    def targets(self, prefix: str) -> Iterator[tuple[str, Slot]]:
        first = 0
        layout = self.form.layout
        for name, (span, size) in self.outputs.items():
            rows = slice(first, first + span.size)
            codes, scales, zeros = (tensor.data[rows] for tensor in (self.codes, self.scales, self.zeros))
            shapes = layout.shapes(size, self.in_features, self.form.group or self.in_features)
            readers: dict[str, _Codes | _Zeros | _Scales] = {
                layout.codes.name: _Codes(self, span, codes),
                layout.scales.name: _Scales(self, span, scales, zeros),
            }
            if self.form.has_zeros:
                readers[layout.zeros.name] = _Zeros(self, span, zeros)
            for tensor, reader in readers.items():
                yield f"{prefix}{name}.{tensor}", ReadSlot(reader.to, shapes[tensor], {}, reader.read)
            first += span.size

    def finish(self) -> None:
        """Puts the inputs' order in place, which no tensor of the checkpoint fills by itself, and codes as devices want them."""
        if self.order is not None and self.form.order is not None:
            self.order.data.copy_(self.form.order)
        parameters = self.codes, self.scales, self.zeros
        codes, scales, zeros = (parameter.data for parameter in parameters)
        if runs_triton(codes):
            if takes_pairs(self.size, scales.shape[1], scales.dtype):
                self.packed = pack_for_gpu(codes, scales, zeros)
        elif codes.device.type == "cpu":
            self.packed = pack_for_cpu(codes, scales, zeros)
        if self.packed is not None:
            for parameter in parameters:
                parameter.data = parameter.data.new_empty(0)  # the packed form holds what it needs

    def launch_all(self) -> None:
        """All that products of any number of rows launch, so that it has been compiled; on a GPU with Triton."""
        if isinstance(self.packed, PairedWeights):
            self.packed.launch_all()
        else:
            launch_all(self.codes, self.scales, self.zeros)

    @property
    def packed_bytes(self) -> int:
        """Of the weights that are no parameters any more."""
        return 0 if self.packed is None else self.packed.nbytes

    def stored_groups(self) -> torch.Tensor:
        """The checkpoint's group of each of this rank's groups, int64; those that hold none of its inputs are -1."""
        begin = self.in_span.start - self.front + torch.arange(self.size // self.group) * self.group
        has_some = (begin < self.in_span.stop) & (begin + self.group > self.in_span.start)
        return torch.where(has_some, begin // (self.form.group or self.in_features), -1)


@dataclass(frozen=True, slots=True, eq=False)
class _Codes:
    format: GroupedInt4Format
    span: Span
    to: torch.Tensor

    def read(self, stored: Any) -> int:
        of, rows, columns = self.format, (self.span.start, self.span.stop), (self.format.in_span.start, self.format.in_span.stop)
        self.to.zero_()
        if rows[0] == rows[1] or columns[0] == columns[1]:
            return 0
        plane = of.form.layout.codes
        words = plane.fetch(stored, rows, columns)
        for first, values in plane.chunks(words, rows, columns):
            if of.form.order is not None:
                values = values[:, of.form.order]
            values = F.pad(values, (of.front, of.size - of.front - values.shape[1]))
            self.to[first : first + len(values)].copy_(pack_pairs(values))
        return words.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class _PerGroup:
    format: GroupedInt4Format
    span: Span
    to: torch.Tensor

    def place(self, values: torch.Tensor, groups: torch.Tensor) -> None:
        """Write [n, stored groups] to those of this rank's groups that have inputs."""
        self.to.zero_()
        has_some = groups >= 0
        spread = values[:, groups[has_some] - groups[has_some][0]]
        first = int(has_some.nonzero()[0])
        self.to[: len(values), first : first + spread.shape[1]].copy_(spread)

    def ends(self) -> tuple[tuple[int, int], tuple[int, int], torch.Tensor] | None:
        """(rows, stored groups, the stored group of each group); None where this rank has padding only."""
        groups = self.format.stored_groups()
        found = groups[groups >= 0]
        if self.span.start == self.span.stop or not len(found):
            self.to.zero_()
            return None
        return (self.span.start, self.span.stop), (int(found[0]), int(found[-1]) + 1), groups


@dataclass(frozen=True, slots=True, eq=False)
class _Zeros(_PerGroup):
    def read(self, stored: Any) -> int:
        ends = self.ends()
        if ends is None:
            return 0
        plane, (rows, columns, groups) = self.format.form.layout.zeros, ends
        words = plane.fetch(stored, rows, columns)
        values = plane.unpack(words, rows, columns)
        less = self.format.form.zeros_are_less
        self.place(values + (stored_zeros_are_less(values) if less is None else less), groups)
        return words.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class _Scales(_PerGroup):
    zeros: torch.Tensor

    def read(self, stored: Any) -> int:
        ends = self.ends()
        if not self.format.form.has_zeros:
            self.zeros.fill_(MIDDLE)
        if ends is None:
            return 0
        rows, columns, groups = ends
        values = self.format.form.layout.scales.fetch(stored, rows, columns)
        self.place(values, groups)
        return values.nbytes


def _parameter(rows: int, columns: int | None, dtype: torch.dtype) -> nn.Parameter:
    shape = (rows,) if columns is None else (rows, columns)
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
