"""One projection of all experts of a rank: a linear layer each while a checkpoint is read, and one tensor of all for products.

So whatever forms linear layers have (detect_formats.py) are forms of experts too. The experts' parameters lie in one tensor from
the beginning, and stacking them takes neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.kernels.experts import experts_matmul, launch_all, prepare
from vlserve.kernels.experts.launch import takes_block
from vlserve.kernels.experts.types import DenseExperts, ExpertWeights, Fp8Experts, Int4Experts, Mxfp4Experts, Routes
from vlserve.llm.formats import DenseFormat
from vlserve.llm.formats_8bit import EightBitFormat, Fp8Format
from vlserve.llm.formats_int4 import GroupedInt4Format
from vlserve.llm.formats_mxfp4 import Mxfp4Format
from vlserve.llm.linear import Linear


class StackedExperts(nn.Module):
    """x [T, in], or [T*S, in], to [T*S, out], each row by the expert that it is for; `linears` are an expert's each."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.weights: ExpertWeights | None = None  # once the weights are there
        self.bias: torch.Tensor | None = None  # [E, out]
        self.padding: tuple[int, int] | None = None  # where groups of inputs begin before them or end behind them
        self._stacks: dict[str, torch.Tensor] = {}
        self._lie_together(has_values=False)

    def forward(self, x: torch.Tensor, routes: Routes) -> torch.Tensor:
        assert self.weights is not None, "finish() comes before forward()"
        return experts_matmul(x if self.padding is None else F.pad(x, self.padding), self.weights, routes, self.bias)

    def each(self) -> Iterator[Linear]:
        """The linear layers, until `finish`."""
        for linear in self.linears:
            assert isinstance(linear, Linear)
            yield linear

    def finish(self) -> None:
        """Called once, when all weights are there and before the first use."""
        form = next(self.each()).format
        self.weights, self.bias = prepare(self._weights()), self._stacks.get("bias")
        if isinstance(form, GroupedInt4Format) and form.size != form.in_span.size:
            self.padding = form.front, form.size - form.front - form.in_span.size
        self.linears, self._stacks = nn.ModuleList(), {}

    def launch_all(self, top_k: int, dtype: torch.dtype, most_tokens: int) -> None:
        """All that products of steps of up to so many tokens launch, so that it has been compiled; on a GPU with Triton."""
        assert self.weights is not None, "finish() comes before launch_all()"
        launch_all(self.weights, top_k=top_k, dtype=dtype, bias=self.bias, most_tokens=most_tokens)

    @property
    def packed_bytes(self) -> int:
        """Of what are no parameters any more."""
        return _num_bytes((self.weights, self.bias))

    def _weights(self) -> ExpertWeights:
        form, stacks = next(self.each()).format, self._stacks
        if isinstance(form, DenseFormat):
            return DenseExperts(weight=stacks["format.weight"])
        if isinstance(form, GroupedInt4Format):
            return Int4Experts(codes=stacks["format.codes"], scales=stacks["format.scales"], zeros=stacks["format.zeros"])
        if isinstance(form, Mxfp4Format):
            return Mxfp4Experts(codes=stacks["format.codes"], scales=stacks["format.scales"])
        assert isinstance(form, EightBitFormat)
        codes, width = stacks["format.codes"], None if form.block is None else form.block[1]
        if isinstance(form, Fp8Format) and codes.device.type != "cpu" and takes_block(width):  # others are converted
            offset = 0 if width is None else form.in_span.start % width
            stored = codes.view(form.stored_dtype)
            return Fp8Experts(codes=stored, scales=stacks["format.scales"], block=width, offset=offset)
        weight = torch.empty(codes.shape, dtype=form.dtype, device=codes.device)
        for linear, part in zip(self.each(), weight, strict=True):
            assert isinstance(linear.format, EightBitFormat)
            part.copy_(linear.format.dequantise())
        return DenseExperts(weight=weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StackedExperts:
        has_values = not any(parameter.is_meta for parameter in self.parameters())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._lie_together(has_values)
        return self

    def _lie_together(self, has_values: bool) -> None:
        """Put each parameter of all experts into one tensor."""
        self._stacks = {}
        found = [dict(linear.named_parameters()) for linear in self.linears]
        for name, first in found[0].items() if found else ():
            whole = torch.empty(len(found), *first.shape, dtype=first.dtype, device=first.device)
            for parameters, part in zip(found, whole, strict=True):
                if has_values:
                    part.copy_(parameters[name])
                parameters[name].data = part
            self._stacks[name] = whole


def check_experts(linears: Iterable[tuple[str, Linear]]) -> None:
    """Raises ValueError where the experts of a layer are not all stored in one form, by the names that `linears` gives."""
    firsts: dict[tuple[str, ...], tuple[str, Any]] = {}
    for names, linear in linears:
        layer, is_expert, _ = names.partition(".experts.")
        if not is_expert:
            continue
        form, projections = linear.format, tuple(linear.format.outputs)
        if isinstance(form, GroupedInt4Format) and form.order is not None:
            raise ValueError(
                f"{names}{projections[0]}: its groups are not of neighbouring inputs (desc_act or actorder), which experts "
                "cannot have; supported: a checkpoint without desc_act"
            )
        kind = type(form), [(name, tensor.shape, tensor.dtype) for name, tensor in linear.named_parameters()]
        first, expected = firsts.setdefault((layer, *projections), (names, kind))
        if kind != expected:
            raise ValueError(
                f"{first}{projections[0]} and {names}{projections[0]} are stored in different forms; supported: one form for all "
                "experts of a layer"
            )


def _num_bytes(held: object) -> int:
    """Of tensors, and of what holds some."""
    if isinstance(held, tuple):
        return sum(map(_num_bytes, held))
    fields = getattr(held, "__dataclass_fields__", ())
    return held.nbytes if isinstance(held, torch.Tensor) else sum(_num_bytes(getattr(held, name)) for name in fields)
