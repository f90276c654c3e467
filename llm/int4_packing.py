"""How checkpoints lay 4-bit codes out in 32-bit words, both ways. Pure functions on tensors.

A quantised linear layer with N outputs and K inputs is `codes` uint8 [N, K] with 0..15, `scales` [N, K/G] and `zeros` uint8
[N, K/G] with 0..16: w = (code - zero) * scale, a scale and a zero point for each G neighbouring inputs.
Sources of the layouts: AutoAWQ (awq/modules/linear/gemm.py, gemv.py), GPTQModel, compressed-tensors (pack_quantized).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

IN_WORD = 8  # codes in a word
SEQUENTIAL = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # column c of eight lies in nibble AWQ_ORDER[c]
MIDDLE = 8  # the zero point of symmetric codes
AT_ONCE = 2**20  # codes that are unpacked at a time, a byte each

Ends = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plane:
    """How a matrix of rows by columns lies in a stored tensor: perhaps transposed, perhaps eight values in a word."""

    name: str  # the tensor's, behind the layer's
    is_transposed: bool = False
    packed: int | None = None  # along rows (0) or columns (1)
    order: tuple[int, ...] = SEQUENTIAL

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of the stored tensor."""
        sizes = [rows, columns]
        if self.packed is not None:
            sizes[self.packed] = -(-sizes[self.packed] // IN_WORD)
        return tuple(reversed(sizes)) if self.is_transposed else tuple(sizes)

    def fetch(self, stored: Any, rows: Ends, columns: Ends) -> torch.Tensor:
        """Values, or the words that hold them and their neighbours, as rows by columns."""
        slices = [slice(*rows), slice(*columns)]
        if self.packed is not None:
            first, last = (rows, columns)[self.packed]
            slices[self.packed] = slice(first // IN_WORD, -(-last // IN_WORD))
        part = stored[tuple(reversed(slices) if self.is_transposed else slices)]
        return part.t() if self.is_transposed else part

    def unpack(self, words: torch.Tensor, rows: Ends, columns: Ends) -> torch.Tensor:
        """uint8 [rows, columns] of what `fetch` gave for these ends."""
        if self.packed is None:
            return words
        first, last = (rows, columns)[self.packed]
        offset = first % IN_WORD
        values = unpack_words(words.movedim(self.packed, -1), self.order).movedim(-1, self.packed)
        return values.narrow(self.packed, offset, last - first)

    def chunks(self, words: torch.Tensor, rows: Ends, columns: Ends) -> Iterator[tuple[int, torch.Tensor]]:
        """(its first row, uint8 [n, columns]) for some rows after the other, so that little is unpacked at a time."""
        step = max(IN_WORD, AT_ONCE // max(1, columns[1] - columns[0]) // IN_WORD * IN_WORD)
        first = rows[0] - rows[0] % IN_WORD  # a word's first row
        for begin in range(first, rows[1], step):
            ends = (max(begin, rows[0]), min(begin + step, rows[1]))
            if self.packed == 0:
                part = words[(begin - first) // IN_WORD : -(-(ends[1] - first) // IN_WORD)]
            else:
                part = words[ends[0] - rows[0] : ends[1] - rows[0]]
            yield ends[0] - rows[0], self.unpack(part, ends, columns)


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a quantised layer: codes [N, K], zeros and scales [N, K/G]."""

    codes: Plane
    zeros: Plane
    scales: Plane
    is_padded: bool = False  # zeros and scales have more columns than groups

    def shapes(self, rows: int, columns: int, group: int) -> dict[str, tuple[int, ...]]:
        """Of the stored tensors, by name."""
        groups = columns // group
        if self.is_padded:
            groups = _padded_words(columns, group) * IN_WORD
        return {
            self.codes.name: self.codes.shape(rows, columns),
            self.zeros.name: self.zeros.shape(rows, groups),
            self.scales.name: self.scales.shape(rows, groups),
        }


AWQ_GEMM = Layout(
    Plane("qweight", is_transposed=True, packed=0, order=AWQ_ORDER),
    Plane("qzeros", is_transposed=True, packed=0, order=AWQ_ORDER),
    Plane("scales", is_transposed=True),
)
AWQ_GEMV = Layout(Plane("qweight", packed=1), Plane("qzeros", packed=1), Plane("scales"), is_padded=True)
GPTQ = Layout(
    Plane("qweight", is_transposed=True, packed=1),
    Plane("qzeros", is_transposed=True, packed=0),
    Plane("scales", is_transposed=True),
)
COMPRESSED = Layout(Plane("weight_packed", packed=1), Plane("weight_zero_point", packed=0), Plane("weight_scale"))
AWQ = {"gemm": AWQ_GEMM, "gemv": AWQ_GEMV}


def unpack_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *, version: str = "gemm"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AutoAWQ's tensors -> (codes, scales, zeros)."""
    rows, words = (qweight.shape[1], qweight.shape[0]) if version == "gemm" else (qweight.shape[0], qweight.shape[1])
    if version == "gemm":
        return _unpack(AWQ_GEMM, qweight, qzeros, scales, rows * IN_WORD, words, scales.shape[0])
    columns = words * IN_WORD
    fitting = [groups for groups in range(1, scales.shape[1] + 1) if columns % groups == 0]
    fitting = [n for n in fitting if _padded_words(columns, columns // n) * IN_WORD == scales.shape[1]]
    if not fitting:
        raise ValueError(f"scales {list(scales.shape)} fit no group size of {columns} inputs")
    used = _used_columns(scales)
    groups = min((n for n in fitting if n >= used), default=fitting[-1])
    return _unpack(AWQ_GEMV, qweight, qzeros, scales, rows, columns, groups)


def unpack_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None, *, version: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GPTQ's tensors -> (codes, scales, zeros).

    Args:
        g_idx: the group of each input; where they are out of order, the codes' columns are in `input_order(g_idx)`.
        version: gptq stores zero points less one, gptq_v2 as they are; None: the values tell, as `stored_zeros_are_less`.
    """
    rows, columns = qweight.shape[1], qweight.shape[0] * IN_WORD
    codes, scales, zeros = _unpack(GPTQ, qweight, qzeros, scales, rows, columns, scales.shape[0])
    if version == "gptq" or (version is None and stored_zeros_are_less(zeros)):
        zeros = zeros + 1
    order = None if g_idx is None else input_order(g_idx, columns // scales.shape[1])
    return (codes if order is None else codes[:, order]), scales, zeros


def unpack_compressed(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    shape: torch.Tensor | tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """compressed-tensors' pack-quantized tensors -> (codes, scales, zeros)."""
    rows, columns = (int(size) for size in shape)
    codes = COMPRESSED.codes.unpack(weight_packed, (0, rows), (0, columns))
    if weight_zero_point is None:
        return codes, weight_scale, torch.full(weight_scale.shape, MIDDLE, dtype=torch.uint8)
    return codes, weight_scale, COMPRESSED.zeros.unpack(weight_zero_point, (0, rows), (0, weight_scale.shape[1]))


def pack_awq(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, *, version: str = "gemm") -> dict[str, torch.Tensor]:
    """(codes, scales, zeros) -> qweight, qzeros, scales as AutoAWQ has them."""
    if version == "gemv":
        more = _padded_words(codes.shape[1], codes.shape[1] // scales.shape[1]) * IN_WORD - scales.shape[1]
        scales, zeros = (torch.nn.functional.pad(tensor, (0, more)) for tensor in (scales, zeros))
    return _pack(AWQ[version], codes, scales, zeros)


def pack_gptq(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    version: str = "gptq",
) -> dict[str, torch.Tensor]:
    """(codes, scales, zeros) -> qweight, qzeros, scales, g_idx; the inverse of `unpack_gptq` with the same arguments."""
    columns, group = codes.shape[1], codes.shape[1] // scales.shape[1]
    in_order = torch.arange(columns, dtype=torch.int32) // group
    order = None if g_idx is None else input_order(g_idx, group)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(1, order, codes)
    stored = zeros - 1 if version == "gptq" else zeros
    return _pack(GPTQ, codes, scales, stored) | {"g_idx": in_order if g_idx is None else g_idx}


def pack_compressed(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """(codes, scales, zeros) -> compressed-tensors' tensors; without zeros the codes are symmetric around eight."""
    middle = torch.full_like(scales, MIDDLE, dtype=torch.uint8) if zeros is None else zeros
    tensors = _pack(COMPRESSED, codes, scales, middle) | {"weight_shape": torch.tensor(codes.shape)}
    if zeros is None:
        del tensors[COMPRESSED.zeros.name]
    return tensors


def stored_zeros_are_less(zeros: torch.Tensor) -> bool:
    """Whether stored zero points are one less than they are: symmetric codes have eight, so eights are what they are."""
    return not bool((zeros == MIDDLE).all())


def input_order(g_idx: torch.Tensor, group: int) -> torch.Tensor | None:
    """The inputs group by group, int64 [K]; None where they lie so already. Raises ValueError for groups of unequal size."""
    in_order = torch.arange(len(g_idx)) // group
    if torch.equal(g_idx.long(), in_order):
        return None
    order = g_idx.long().argsort(stable=True)
    if not torch.equal(g_idx.long()[order], in_order):
        raise ValueError(f"g_idx gives no {len(g_idx) // group} groups of {group} inputs each")
    return order


def unpack_words(words: torch.Tensor, order: tuple[int, ...] = SEQUENTIAL) -> torch.Tensor:
    """int32 [..., W] -> uint8 [..., 8 W]."""
    nibbles = _fresh(words).view(torch.uint8)
    values = torch.stack([nibbles & 15, nibbles >> 4], dim=-1)  # the lowest byte and in it the lower half come first
    values = values.view(*words.shape, IN_WORD)
    return (values if order == SEQUENTIAL else values[..., list(order)]).flatten(-2)


def pack_words(values: torch.Tensor, order: tuple[int, ...] = SEQUENTIAL) -> torch.Tensor:
    """uint8 [..., V] with 0..15 -> int32 [..., V / 8, rounded up]; zeros fill the last word. Raises ValueError."""
    if values.numel() and int(values.max()) > 15:
        raise ValueError("a code or stored zero point does not fit into four bits; expected 0..15")
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % IN_WORD)).unflatten(-1, (-1, IN_WORD))
    nibbles = values[..., [order.index(place) for place in range(IN_WORD)]]
    return _fresh(nibbles[..., 0::2] | nibbles[..., 1::2] << 4).view(torch.int32).squeeze(-1)


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] with 0..15 -> uint8 [N, K/2]: even inputs in the lower half of a byte, odd ones in the upper."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _unpack(
    layout: Layout, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ends, within = (0, rows), (0, groups)
    return (
        layout.codes.unpack(layout.codes.fetch(codes, ends, (0, columns)), ends, (0, columns)).contiguous(),
        layout.scales.fetch(scales, ends, within).contiguous(),
        layout.zeros.unpack(layout.zeros.fetch(zeros, ends, within), ends, within).contiguous(),
    )


def _pack(layout: Layout, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {}
    for plane, values in ((layout.codes, codes), (layout.zeros, zeros), (layout.scales, scales)):
        if plane.packed is not None:
            values = pack_words(values.movedim(plane.packed, -1), plane.order).movedim(-1, plane.packed)
        tensors[plane.name] = (values.t() if plane.is_transposed else values).contiguous()
    return tensors


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    """With the strides of its shape, which `contiguous` leaves as they are along dimensions of one; `view` looks at those."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _padded_words(columns: int, group: int) -> int:
    """Words of zero points in a row as AutoAWQ's gemv pads them: the smaller the groups, the wider the steps."""
    step = {64: 2, 32: 4}.get(group, 1) if group < 128 else 1
    words = -(-(columns // group) // IN_WORD)
    return -(-words // step) * step


def _used_columns(scales: torch.Tensor) -> int:
    """Columns of scales up to the last that is not padding."""
    used = scales.ne(0).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1
