"""Decoders whose checkpoints name or cut their tensors in a way of their own: from these to the names that all others have.

Some store query, key and value, or gate and up, as one tensor. Such a tensor is read as its parts, each of which looks like a
tensor of its own, so that nothing else knows of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from vlserve.llm.config import DecoderConfig

Ranges = tuple[tuple[int, int], ...]
# of packed formats: tensors whose outputs are along dimension 1 (AWQ's gemm, GPTQ); everything else has them along 0
ALONG_1 = ("qweight", "qzeros", "scales")
OF_INPUTS = ("g_idx", "weight_g_idx", "input_scale", "input_zero_point")  # the same for every part
IN_WORD = 8  # codes of four bits


@dataclass(frozen=True, slots=True)
class Part:
    """What of a stored tensor is `name`: ranges of its outputs, one after another, of `total` outputs."""

    name: str
    ranges: Ranges
    total: int

    def of(self, stored: Any) -> Any:
        return PartHandle(stored, self)


@dataclass(frozen=True, slots=True)
class ExpertPart:
    """What of a stored tensor [experts, ...] is `name`: that of one expert of `experts`. Dimension 1 is the outputs, or the last
    one where it `is_turned`; of these every `step`th from `first` on."""

    name: str
    expert: int
    experts: int
    first: int = 0
    step: int = 1
    is_turned: bool = False  # [inputs, outputs], as [outputs, inputs] then

    def of(self, stored: Any) -> Any:
        return ExpertHandle(stored, self)


Renamed = str | Sequence[Part | ExpertPart] | None


class PartHandle:
    """A part of a stored tensor, asked as safetensors' handles are: `get_shape`, `get_dtype`, and slices."""

    def __init__(self, stored: Any, part: Part) -> None:
        shape, kind = tuple(stored.get_shape()), part.name.rpartition(".")[2]
        is_along_1 = kind in ALONG_1 and len(shape) > 1 and shape[1] in (part.total, part.total // IN_WORD)  # gemv's are not
        self._stored, self._shape, self._dim = stored, shape, int(is_along_1)
        self._ranges: list[tuple[int, int]] | None = None  # all of it
        size = shape[self._dim] if shape else 1
        self._outputs = sum(stop - start for start, stop in part.ranges) if kind == "weight_shape" else None
        if size == 1 or kind in OF_INPUTS or self._outputs is not None:
            return
        if any(edge * size % part.total for edges in part.ranges for edge in edges):
            raise ValueError(f"{part.name}: a tensor of shape {list(shape)} cannot be cut into parts of {part.total} outputs")
        self._ranges = [(start * size // part.total, stop * size // part.total) for start, stop in part.ranges]
        length = sum(stop - start for start, stop in self._ranges)
        self._shape = tuple(length if dim == self._dim else size for dim, size in enumerate(shape))

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return str(self._stored.get_dtype())

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self._ranges is None:
            whole: torch.Tensor = self._stored[index]
            return whole if self._outputs is None else torch.tensor([self._outputs, int(whole[1])], dtype=whole.dtype)
        given = [one for one in (index if isinstance(index, tuple) else (index,)) if one is not ...]
        spans = [*given, *[slice(None)] * (len(self._shape) - len(given))]
        start, stop, _ = spans[self._dim].indices(self._shape[self._dim])
        return torch.cat([self._stored[tuple(self._replaced(spans, piece))] for piece in self._pieces(start, stop)], self._dim)

    def _pieces(self, start: int, stop: int) -> Iterator[slice]:
        """Of the stored tensor, what places `start` to `stop` of the part are."""
        at, found = 0, False
        for first, last in self._ranges or ():
            low, high = max(start, at), min(stop, at + last - first)
            if low < high:
                found = True
                yield slice(first + low - at, first + high - at)
            at += last - first
        if not found:
            yield slice(0, 0)

    def _replaced(self, spans: Sequence[slice], piece: slice) -> list[slice]:
        return [piece if dim == self._dim else span for dim, span in enumerate(spans)]


class ExpertHandle:
    """As PartHandle, of an expert's part."""

    def __init__(self, stored: Any, part: ExpertPart) -> None:
        number, *shape = stored.get_shape()
        self._stored, self._part = stored, part
        self._shape = shape[::-1] if part.is_turned else shape
        if number != part.experts or self._shape[0] % part.step or (len(shape) != 2 and part.is_turned):
            raise ValueError(f"{part.name}: a tensor of shape {[number, *shape]} is none of {part.experts} experts")
        self._shape[0] //= part.step

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return str(self._stored.get_dtype())

    def __getitem__(self, index: Any) -> torch.Tensor:
        given = [one for one in (index if isinstance(index, tuple) else (index,)) if one is not ...]
        part, spans = self._part, [*given, *[slice(None)] * (len(self._shape) - len(given))]
        start, stop, _ = spans[0].indices(self._shape[0])
        outputs = slice(start * part.step, max(start, stop) * part.step)
        spans = [spans[1], outputs] if part.is_turned else [outputs, *spans[1:]]
        read = self._stored[(slice(part.expert, part.expert + 1), *spans)][0]
        return (read.T if part.is_turned else read)[part.first :: part.step]


def expanded(renamed: Renamed, stored: Any) -> Iterator[tuple[str, Any]]:
    """(name, handle) of what a stored tensor is; nothing where it is passed over."""
    if isinstance(renamed, str):
        yield renamed, stored
    elif renamed is not None:
        for part in renamed:
            yield part.name, part.of(stored)


def own_names(config: DecoderConfig) -> Callable[[str], Renamed]:
    """For a decoder's checkpoint: the name within it (`model.layers.0...`) to the usual one, or the parts of a tensor."""
    names = NAMES.get(config.model_type)

    def renamed(name: str) -> Renamed:
        return name if names is None else names(name, config)

    return renamed


def _internlm2(name: str, config: DecoderConfig) -> Renamed:
    """`wqkv` has each key-value head's queries, its key and its value side by side. Source: modeling_internlm2.py."""
    for pattern, text in _INTERNLM2:
        name = re.sub(pattern, text, name)
    match = re.fullmatch(r"(.+\.)attention\.wqkv\.(\w+)", name)
    if match is None:
        return name
    heads, dim = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // heads
    each = (queries + 2) * dim
    places = {"q": (0, queries * dim), "k": (queries * dim, (queries + 1) * dim), "v": ((queries + 1) * dim, each)}
    return [
        Part(
            f"{match[1]}self_attn.{part}_proj.{match[2]}",
            tuple((head * each + start, head * each + stop) for head in range(heads)),
            heads * each,
        )
        for part, (start, stop) in places.items()
    ]


_INTERNLM2 = (
    (r"^model\.tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
)


def _phi3(name: str, config: DecoderConfig) -> Renamed:
    """Query, key and value one after another, and gate and up. Source: Phi3 of transformers.

    Where a part of a head's channels is turned, the others of a query and a key are put between its halves, so that pairs are as
    far apart as elsewhere. Attention takes the sum over all channels, whatever their order is.
    """
    dim = config.head_dim
    sizes = {
        "self_attn.qkv_proj": {
            "self_attn.q_proj": config.num_attention_heads * dim,
            "self_attn.k_proj": config.num_key_value_heads * dim,
            "self_attn.v_proj": config.num_key_value_heads * dim,
        },
        "mlp.gate_up_proj": {"mlp.gate_proj": config.intermediate_size, "mlp.up_proj": config.intermediate_size},
    }
    match = re.fullmatch(r"(.+\.)(self_attn\.qkv_proj|mlp\.gate_up_proj)\.(\w+)", name)
    if match is None:
        return name
    parts, start, total = [], 0, sum(sizes[match[2]].values())
    for part, size in sizes[match[2]].items():
        turned = config.rope.dim if part in ("self_attn.q_proj", "self_attn.k_proj") else dim
        heads = range(start, start + size, dim) if turned < dim else ()
        ranges = tuple(span for head in heads for span in _apart(head, dim, turned)) or ((start, start + size),)
        parts.append(Part(f"{match[1]}{part}.{match[3]}", ranges, total))
        start += size
    return parts


def _apart(head: int, dim: int, turned: int) -> Ranges:
    """Of a head that begins at output `head`: half of what is turned, half of what is not, and the other halves."""
    edges = (0, turned // 2, turned, (turned + dim) // 2, dim)
    first, second, third, fourth = ((head + start, head + stop) for start, stop in pairwise(edges))
    return first, third, second, fourth


def _gpt_oss(name: str, config: DecoderConfig) -> Renamed:
    """An expert's gate and up are interleaved, and all experts of a layer are one tensor: in MXFP4 `_blocks` and `_scales`, with
    outputs before inputs; otherwise with inputs before outputs. Source: GPT-OSS of transformers."""
    assert config.experts is not None
    name, number = name.replace(".mlp.router.", ".mlp.gate."), config.experts.num_experts
    match = re.fullmatch(r"(.+\.mlp\.experts\.)(gate_up|down)_proj(_blocks|_scales|_bias|)", name)
    if match is None:
        return name
    kind = {"_blocks": "mxfp4_blocks", "_scales": "mxfp4_scales", "_bias": "bias", "": "weight"}[match[3]]
    places = {"gate_proj": 0, "up_proj": 1} if match[2] == "gate_up" else {"down_proj": 0}
    return [
        ExpertPart(f"{match[1]}{expert}.{projection}.{kind}", expert, number, first, len(places), kind == "weight")
        for expert in range(number)
        for projection, first in places.items()
    ]


NAMES: Mapping[str, Callable[[str, DecoderConfig], Renamed]] = {"gpt_oss": _gpt_oss, "internlm2": _internlm2, "phi3": _phi3}
