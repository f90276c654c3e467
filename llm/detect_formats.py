"""Which format each linear layer of the decoder has in a checkpoint, found from its tensors' names, types and shapes.

A layer is quantised if its packed tensor is there, whatever the configuration lists; the configuration says what the tensors
do not: group size, order of the codes, kind of zero points. Raises ValueError naming the tensor and what is supported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vlserve.llm import formats_mxfp4
from vlserve.llm.decoder import LAYERS, Decoder
from vlserve.llm.formats import Format, ReadSlot, Slot
from vlserve.llm.formats_8bit import WEIGHT, EightBitFormat, Fp8Format, Int8Format
from vlserve.llm.formats_int4 import GroupedInt4Format, Int4Storage
from vlserve.llm.formats_mxfp4 import Mxfp4Format
from vlserve.llm.int4_packing import AWQ, COMPRESSED, GPTQ, Layout, input_order
from vlserve.llm.linear import Linear
from vlserve.llm.quantisation import FP8, INT4, INT8, MXFP4, Quantisation
from vlserve.llm.stacked_experts import check_experts
from vlserve.llm.stored_files import checkpoint_files
from vlserve.llm.stored_names import expanded
from vlserve.llm.tensor_parallel import Span
from vlserve.llm.weights import Rename

PACKED = (GPTQ.codes.name, COMPRESSED.codes.name, formats_mxfp4.BLOCKS)
DENSE = ("F32", "BF16", "F16")
SCALES = ("weight_scale", "weight_scale_inv")
EIGHT_BITS = {"F8_E4M3": FP8, "I8": INT8}
# scales of activations and of the KV cache: activations are taken as they are or rounded by what they are
UNUSED = ("input_scale", "input_zero_point", "output_scale", "k_scale", "v_scale", "q_scale")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint."""

    code: str  # safetensors' name of its type
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def __str__(self) -> str:
        return f"{self.code} {list(self.shape)}"


class StoredTensors:
    """The tensors of a checkpoint by the name that `rename` gives them; a context, which closes the files."""

    def __init__(self, folder: Path, rename: Rename) -> None:
        self.by_name: dict[str, Stored] = {}
        with ExitStack() as stack:
            for path in checkpoint_files(folder):
                try:
                    file = stack.enter_context(safe_open(path, "pt"))
                    for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                        for name, found in expanded(rename(key), file.get_slice(key)):
                            shape = tuple(found.get_shape())
                            self.by_name[name] = Stored(found.get_dtype(), shape, partial(found.__getitem__, ...))
                except SafetensorError as error:
                    raise ValueError(f"{path.name} is damaged or no safetensors file: {error}") from error
            self._stack = stack.pop_all()

    def __enter__(self) -> dict[str, Stored]:
        return self.by_name

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def use_stored_formats(
    decoder: Decoder, prefix: str, tensors: Mapping[str, Stored], quantisation: Quantisation | None, dtype: torch.dtype
) -> None:
    """Give each linear layer of a decoder on the meta device the format that the checkpoint has for it.

    Args:
        prefix: what stands before the decoder's names among `tensors`. dtype: to compute with.
    """
    for names, linear in decoder.linears():
        Finder(prefix + names, linear, tensors, quantisation, dtype).run()
    check_experts((prefix + names, linear) for names, linear in decoder.linears())
    _refuse_others(decoder, prefix, tensors)


class Finder:
    """Finds the format of one linear layer, which may have several projections."""

    def __init__(
        self, prefix: str, linear: Linear, tensors: Mapping[str, Stored], quantisation: Quantisation | None, dtype: torch.dtype
    ) -> None:
        self.prefix, self.linear, self.tensors, self.dtype = prefix, linear, tensors, dtype
        self.given = quantisation
        self.outputs = linear.format.outputs

    def run(self) -> None:
        kinds = {name: self._kind(name) for name in self.outputs}
        if len(set(kinds.values())) > 1:
            stored = ", ".join(f"{name} {kind or 'dense'}" for name, kind in kinds.items())
            raise ValueError(
                f"{self.prefix}: {stored}; projections that read the same input are one matrix here; supported: one form for all"
            )
        kind = next(iter(kinds.values()))
        if kind is None:
            return
        given = self._settings(kind)
        for name in self.outputs:
            given.check_inputs(self.linear.format.in_features, self.prefix + name)
        self.linear.format = (
            self._int4(given) if kind == INT4 else self._mxfp4() if kind == MXFP4 else self._eight_bits(kind, given)
        )
        self.linear.others = dict(self._others())

    def _kind(self, name: str) -> str | None:
        """INT4, FP8, INT8, MXFP4, or None for a dense projection, or one that is missing."""
        if f"{self.prefix}{name}.{formats_mxfp4.BLOCKS}" in self.tensors:
            return MXFP4
        if any(f"{self.prefix}{name}.{packed}" in self.tensors for packed in PACKED):
            return INT4
        weight = self.tensors.get(f"{self.prefix}{name}.{WEIGHT}")
        if weight is None or weight.code in DENSE:
            return None
        if weight.code not in EIGHT_BITS:
            supported = ", ".join((*DENSE, *EIGHT_BITS))
            raise ValueError(f"{self.prefix}{name}.{WEIGHT} is {weight}; supported: {supported}, or 4 bits packed in I32")
        return EIGHT_BITS[weight.code]

    def _settings(self, kind: str) -> Quantisation:
        name = self.prefix + next(iter(self.outputs))
        if self.given is None and kind != INT4:  # their tensors say it all
            return Quantisation(where="the checkpoint", method=kind, kind=kind)
        if self.given is None:
            raise ValueError(
                f"{name} is packed, but there is no quantization_config in config.json, its text_config or llm_config, nor a "
                "quantize_config.json or quant_config.json beside it; they tell the group size and the order of the codes"
            )
        if self.given.kind != kind:
            raise ValueError(f"{name} is {kind}, but {self.given.where} says {self.given}")
        return self.given

    def _int4(self, given: Quantisation) -> Format:
        layouts = {"awq": AWQ.get(given.version), "gptq": GPTQ, "compressed-tensors": COMPRESSED}
        layout = layouts[given.method]
        assert layout is not None
        old = self.linear.format
        has_zeros = not given.symmetric or given.method == "gptq"
        if given.method == "awq" and given.symmetric:
            has_zeros = self._first_name(next(iter(self.outputs)), (layout.zeros.name,)) is not None
        for name, (_, size) in self.outputs.items():
            shapes = layout.shapes(size, old.in_features, given.group_size or old.in_features)
            if not has_zeros:
                del shapes[layout.zeros.name]
            self._check_tensors(name, layout, shapes, given)
        form = Int4Storage(
            layout=layout,
            group=given.group_size,
            has_zeros=has_zeros,
            zeros_are_less=_zeros_are_less(given),
            order=self._order(given, given.group_size or old.in_features),
        )
        with torch.device("meta"):
            return GroupedInt4Format(old.in_span, old.in_features, old.outputs, form, self.dtype)

    def _mxfp4(self) -> Format:
        old = self.linear.format
        with torch.device("meta"):
            made = Mxfp4Format(old.in_span, old.in_features, old.outputs)
        for name, slot in made.targets(self.prefix):
            found = self.tensors.get(name)
            if found is None or found.code != "U8" or found.shape != slot.full:
                raise ValueError(f"{name} is {found or 'missing'}; MXFP4 needs U8 {list(slot.full)}")
        return made

    def _check_tensors(self, name: str, layout: Layout, shapes: dict[str, tuple[int, ...]], given: Quantisation) -> None:
        for key, shape in shapes.items():
            found = self.tensors.get(f"{self.prefix}{name}.{key}")
            if found is None:
                raise ValueError(f"{self.prefix}{name}.{key} is missing; {given.where} says {given}, which needs it")
            codes = DENSE if key == layout.scales.name else ("I32",)
            if found.code not in codes or found.shape != shape:
                expected = f"{' or '.join(codes)} {list(shape)}"
                raise ValueError(
                    f"{self.prefix}{name}.{key} is {found}; {given.where} says {given}, for which {expected} is expected"
                )
        zeros = self.tensors.get(f"{self.prefix}{name}.{layout.zeros.name}")
        if layout.zeros.name not in shapes and zeros is not None:
            raise ValueError(f"{self.prefix}{name}.{layout.zeros.name} is {zeros}; {given.where} says symmetric, without any")

    def _order(self, given: Quantisation, group: int) -> torch.Tensor | None:
        """The inputs group by group, where the checkpoint has them in another order."""
        orders: dict[str, torch.Tensor | None] = {}
        for name in self.outputs:
            stored = self._first(name, ("g_idx", "weight_g_idx"))
            if stored is not None and stored.shape != (self.linear.format.in_features,):
                raise ValueError(f"{self.prefix}{name}: g_idx is {stored}; expected one number an input")
            try:
                orders[name] = None if stored is None else input_order(stored.read(), group)
            except ValueError as error:
                raise ValueError(f"{self.prefix}{name}: {error}") from error
        order, old = next(iter(orders.values())), self.linear.format
        for name, other in orders.items():
            if (order is None) != (other is None) or (order is not None and other is not None and not torch.equal(order, other)):
                raise ValueError(
                    f"{self.prefix}: g_idx of {name} and {next(iter(orders))} differ; projections that read the same input are "
                    "one matrix here; supported: one order for all"
                )
        if order is not None and old.in_span != Span(0, old.in_features, old.in_features):
            raise ValueError(
                f"{self.prefix}{next(iter(orders))}: its groups are not of neighbouring inputs (desc_act or actorder in "
                f"{given.where}), which several ranks cannot share; supported: tp 1, or a checkpoint without desc_act"
            )
        return order

    def _eight_bits(self, kind: str, given: Quantisation) -> Format:
        old = self.linear.format
        scales = {name: self._first_name(name, SCALES) for name in self.outputs}
        for name, key in scales.items():
            if key is None:
                weight = self.tensors[f"{self.prefix}{name}.{WEIGHT}"]
                raise ValueError(f"{self.prefix}{name}.{WEIGHT} is {weight}, but {' or '.join(SCALES)} beside it is missing")
        (key,) = set(scales.values()) if len(set(scales.values())) == 1 else (None,)
        if key is None:
            raise ValueError(f"{self.prefix}: scales are called {scales}; supported: one name for all")
        shapes = {name: self.tensors[f"{self.prefix}{name}.{key}"].shape for name in self.outputs}
        for name, (_, size) in self.outputs.items():
            self._check_scales(name, key, size, given)
        made: type[EightBitFormat] = Fp8Format if kind == FP8 else Int8Format
        settings: dict[str, Any] = {"scale": key, "scale_shapes": shapes, "block": given.block, "dtype": self.dtype}
        with torch.device("meta"):
            return made(old.in_span, old.in_features, old.outputs, **settings)

    def _check_scales(self, name: str, key: str, size: int, given: Quantisation) -> None:
        weight, scales = (self.tensors[f"{self.prefix}{name}.{last}"] for last in (WEIGHT, key))
        columns = self.linear.format.in_features
        if weight.shape != (size, columns):
            raise ValueError(f"{self.prefix}{name}.{WEIGHT} is {weight}, config.json asks for [{size}, {columns}]")
        if given.block is None:
            allowed = [(), (1,), (1, 1), (size,), (size, 1)]
        else:
            allowed = [(-(-size // given.block[0]), -(-columns // given.block[1]))]
        if scales.code not in DENSE or scales.shape not in allowed:
            shapes = " or ".join(str(list(shape)) for shape in allowed)
            raise ValueError(f"{self.prefix}{name}.{key} is {scales}; {given.where} says {given}; expected {shapes}")
        if f"{self.prefix}{name}.weight_zero_point" in self.tensors:
            raise ValueError(f"{self.prefix}{name}.weight_zero_point: codes of eight bits with zero points are not supported")

    def _others(self) -> Iterator[tuple[str, Slot]]:
        """What else the checkpoint has for the layer: what was read above, or is checked when it is read, or is not used."""
        for name, (_, size) in self.outputs.items():
            checks: dict[str, Callable[[str, torch.Tensor], None]] = {
                "g_idx": _accept,
                "weight_g_idx": _accept,
                "weight_shape": partial(_check_shape, (size, self.linear.format.in_features)),
            }
            checks |= dict.fromkeys(UNUSED, _accept)
            if self.linear.bias is None:
                checks["bias"] = _check_zero  # GPTQ's writers give every layer one
            for key, check in checks.items():
                yield from self._other(f"{name}.{key}", check)
        for key in ("k_scale", "v_scale", "q_scale"):
            if "k_proj" in self.outputs:
                yield from self._other(key, _accept)

    def _other(self, key: str, check: Callable[[str, torch.Tensor], None]) -> Iterator[tuple[str, Slot]]:
        name = self.prefix + key
        if name in self.tensors:
            shape = self.tensors[name].shape
            yield key, ReadSlot(torch.empty(0), shape, {}, partial(_checked, name, check))

    def _first_name(self, name: str, keys: tuple[str, ...]) -> str | None:
        return next((key for key in keys if f"{self.prefix}{name}.{key}" in self.tensors), None)

    def _first(self, name: str, keys: tuple[str, ...]) -> Stored | None:
        key = self._first_name(name, keys)
        return None if key is None else self.tensors[f"{self.prefix}{name}.{key}"]


def _zeros_are_less(given: Quantisation) -> bool | None:
    """Of stored zero points; None where their values must tell, since writers of both kinds call themselves gptq."""
    if given.method != "gptq":
        return False
    return None if given.symmetric is not False else given.version == "gptq"


def _refuse_others(decoder: Decoder, prefix: str, tensors: Mapping[str, Stored]) -> None:
    """Raises ValueError for a quantised tensor that belongs to none of the decoder's linear layers."""
    known = {prefix + names + name for names, linear in decoder.linears() for name in linear.format.outputs}
    for name, stored in tensors.items():
        layer, _, last = name.rpartition(".")
        is_packed = last in PACKED or (last == WEIGHT and stored.code not in DENSE)
        if is_packed and layer not in known:
            raise ValueError(
                f"{name} is {stored}: only the decoder's linear layers ({prefix}{LAYERS}*) can be quantised; supported for all "
                f"others, such as the vision encoder, the projector, embeddings and head: {', '.join(DENSE)}"
            )


def _checked(name: str, check: Callable[[str, torch.Tensor], None], stored: Any) -> int:
    tensor = stored[...]
    check(name, tensor)
    return int(tensor.nbytes)


def _accept(name: str, tensor: torch.Tensor) -> None:
    """Read before, or not used."""


def _check_shape(shape: tuple[int, int], name: str, tensor: torch.Tensor) -> None:
    if tuple(tensor.tolist()) != shape:
        raise ValueError(f"{name} says {tensor.tolist()}, config.json asks for {list(shape)}")


def _check_zero(name: str, tensor: torch.Tensor) -> None:
    if tensor.any():
        raise ValueError(f"{name} is not zero, and the layers of this architecture have no bias there")
