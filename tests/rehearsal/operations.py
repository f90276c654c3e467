"""What launches kernels, the functions `*_triton` of kernels/*/triton.py: compared with their definitions on the very tensors
that an engine gave them, and called once more for each other card, without running anything, to see what they launch there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tests.kernels.errors import TOLERANCE, rms_ratio
from tests.kernels.signatures import Signature
from tests.rehearsal import cuda
from tests.rehearsal.cuda import Card, Rehearsal
from tests.rehearsal.device import DeviceTensor
from vlserve.kernels.attention.plan import FixedDecodes, read_shape
from vlserve.kernels.attention.reference import paged_attention_ref
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.experts.pairs import unpack_experts
from vlserve.kernels.experts.reference import combine_ref, experts_matmul_ref
from vlserve.kernels.experts.types import PairedExperts, ours
from vlserve.kernels.gate.reference import clamped_swiglu_ref, silu_mul_ref
from vlserve.kernels.group_sums.reference import group_sums_ref
from vlserve.kernels.head.reference import head_matmul_ref, int8_matmul_ref
from vlserve.kernels.int4.reference import awq_dequantize_ref, awq_matmul_ref
from vlserve.kernels.int4_pairs.launch import device_of
from vlserve.kernels.int4_pairs.reference import unpack_pairs
from vlserve.kernels.int4_pairs.types import PairedCodes
from vlserve.kernels.kv_cache.reference import dequantize_ref
from vlserve.kernels.kv_cache.types import Blocks, QuantizedBlocks
from vlserve.kernels.norms.reference import add_rms_norm_ref, add_scaled_norm_ref, layer_norm_ref, rms_norm_ref
from vlserve.kernels.rotary.reference import rotary_ref, rotary_store_ref
from vlserve.kernels.sampling.reference import draw_ref

if TYPE_CHECKING:
    from tests.rehearsal.launches import Launches

ROOMS = ("attention", "experts", "gate", "group_sums", "head", "int4", "int4_pairs", "norms", "rotary", "sampling")
CARDS = (cuda.A100, cuda.H100, cuda.B200, cuda.RTX5090)
SMALL = 2**20  # numbers of all tensors: more is not compared
COMPARED: set[frozenset[Signature]] = set()  # of this process


@dataclass(frozen=True)
class Place:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        last = self.offset + 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        inner = torch.empty(max(last, 0), dtype=self.dtype, device="meta").as_strided(self.shape, self.stride, self.offset)
        return DeviceTensor(inner, torch.device("cuda", 0))


class Operations:
    """`calls`: by what they launched, functions with their arguments' places."""

    def __init__(self, launches: Launches) -> None:
        self.launches, self.calls = launches, dict[frozenset[Signature], tuple[Callable[..., Any], Any, Any]]()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for room in ROOMS:
            module = importlib.import_module(f"vlserve.kernels.{room}.triton")
            for name, function in list(vars(module).items()):
                if name.endswith("_triton") and function.__module__ == module.__name__:
                    monkeypatch.setattr(module, name, self._watched(name, function))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = mapped((args, kwargs), copied) if self.launches.runs and is_small((args, kwargs)) else None
            self.launches.thread.launched = noted = set[Signature]()
            result = function(*args, **kwargs)
            launched = frozenset(noted)
            if launched and launched not in self.calls:
                self.calls[launched] = function, *mapped((args, kwargs), placed)
            if given is not None and launched not in COMPARED:
                COMPARED.add(launched)
                compare(name, given, mapped((args, kwargs), inner), mapped(result, inner))
            return result

        return call

    def on(self, card: Card) -> set[Signature]:
        """What the same calls launch on another card."""
        from tests.rehearsal.launches import Launches

        other = Rehearsal(card)
        found = Launches(other.shared)
        device_of.cache_clear()
        with pytest.MonkeyPatch.context() as monkeypatch, other.entered(), torch.inference_mode():
            cuda.install(monkeypatch, other)

            def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
                found.note(kernel, args, grid, kwargs)

            monkeypatch.setattr(InterpretedFunction, "run", noted)
            for function, args, kwargs in self.calls.values():
                args, kwargs = mapped((args, kwargs), made)
                function(*replanned(args), **kwargs)
        device_of.cache_clear()
        return set(found.signatures)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with what is in its tuples, lists, dictionaries and data classes changed. Plans of launches are left out, but where
    a recorded step writes them anew, for which there is the place of its schedule."""
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(one, change) for one in value)
    if isinstance(value, dict):
        return {key: mapped(one, change) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, (type, Place)):
        old = {one.name: getattr(value, one.name) for one in fields(value)}
        kept = {name: mapped(one, change) for name, one in old.items() if name != "launches"}
        if isinstance(value, AttentionMetadata):
            plans = {} if value.query_lens else value.launches
            kept["launches"] = {key: [change(getattr(of, "schedule", of)) for of in one] for key, one in plans.items()}
        return replace(value, **kept)
    return change(value)


def replanned(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """For this card, attention of a recorded step."""
    metadata = args[3] if len(args) > 3 else None
    if not isinstance(metadata, AttentionMetadata) or metadata.query_lens:
        return args
    query, keys = args[:2]
    fixed = FixedDecodes(len(query), read_shape(query.shape[1], query.dtype, query.device, keys))
    ((old,),) = metadata.launches.values()
    schedule = Place((fixed.num_numbers,), (1,), old.storage_offset(), torch.int32).made()
    return (*args[:3], replace(metadata, launches=fixed.launches(schedule, metadata.block_tables)), *args[4:])


def made(one: Any) -> Any:
    return one.made() if isinstance(one, Place) else one


def inner(one: Any) -> Any:
    return one.inner if isinstance(one, DeviceTensor) else one


def copied(one: Any) -> Any:
    return one.inner.clone() if isinstance(one, DeviceTensor) else one


def placed(one: Any) -> Any:
    if not isinstance(one, torch.Tensor):
        return one
    return Place(tuple(one.shape), one.stride(), one.storage_offset(), one.dtype)


def is_small(given: Any) -> bool:
    """Whether what a call is given can be compared. A plan that is already made may be of other lengths than its step's: those of
    recorded steps are written anew for each replay."""
    found: list[DeviceTensor] = []
    mapped(given, lambda one: found.append(one) if isinstance(one, DeviceTensor) else None)
    is_planned = any(isinstance(one, AttentionMetadata) and one.launches for one in given[0])
    return not is_planned and sum(one.numel() for one in found) <= SMALL and not any(one.inner.is_meta for one in found)


def compare(name: str, before: Any, after: Any, result: Any) -> None:
    """A call's result, and what it has written to, with the definition on what it was given."""
    (args, kwargs), (changed, _) = before, after
    for got, want in DEFINITIONS[name](args, kwargs, changed, result):
        assert got.shape == want.shape, f"{name} gave {tuple(got.shape)} instead of {tuple(want.shape)}"
        if not got.is_floating_point():
            assert torch.equal(got, want), f"{name} is not its definition"
            continue
        if not want.isfinite().all():  # what a model made of numbers that were too large: which of them are lost may differ
            continue
        error = rms_ratio(got, want)
        assert error < 4 * TOLERANCE[got.dtype], f"{name} is {error:.1e} from its definition"


Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def _attention(args: Any, kwargs: Any, changed: Any, result: Any) -> Pairs:
    query, keys, values, metadata, scale = args
    assert isinstance(metadata, AttentionMetadata)
    options = {name: kwargs.get(name) for name in ("window", "sinks")}
    return [(result, paged_attention_ref(query.double(), keys, values, metadata, scale, **options))]


def _with_sums(result: torch.Tensor, sums: torch.Tensor | None) -> Pairs:
    return [] if sums is None else [(sums, group_sums_ref(result.flatten(0, -2), torch.empty_like(sums)))]


def _norm(args: Any, kwargs: Any, changed: Any, result: Any) -> Pairs:
    x, weight, eps, *sums = args
    return [(result, rms_norm_ref(x.double(), weight.double(), eps)), *_with_sums(result, changed[3] if sums else None)]


def _add_norm(args: Any, kwargs: Any, changed: Any, result: Any) -> Pairs:
    x, residual, weight, eps, *sums = args
    _, total = add_rms_norm_ref(x.double(), residual.double(), weight.double(), eps)
    of_rounded = rms_norm_ref(result[1].double(), weight.double(), eps)
    return [(result[0], of_rounded), (result[1], total), *_with_sums(result[0], changed[4] if sums else None)]


def _add_scaled_norm(args: Any, kwargs: Any, changed: Any, result: Any) -> Pairs:
    branch, residual, scale, weight, bias, eps = (one.double() if isinstance(one, torch.Tensor) else one for one in args)
    normed, total = result
    _, want = add_scaled_norm_ref(branch, residual, scale, weight, bias, eps)
    total64 = total.double()
    return [
        (normed, rms_norm_ref(total64, weight, eps) if bias is None else layer_norm_ref(total64, weight, bias, eps)),
        (total, want),
    ]


def _pairs(args: Any, kwargs: Any, changed: Any, result: Any) -> Pairs:
    x, _, packed = args
    assert isinstance(packed, PairedCodes)
    return [(result, awq_matmul_ref(x[:, : packed.inputs].double(), *unpack_pairs(packed)))]


def _experts(args: Any, kwargs: Any, changed: Any, result: Any) -> Pairs:
    x, weights, routes, bias = args
    stored = unpack_experts(weights) if isinstance(weights, PairedExperts) else weights
    return [(result, experts_matmul_ref(x.double(), stored, routes, bias))]


def _routes(args: Any, kwargs: Any, changed: Any, result: Any) -> Pairs:
    """In what order the choices are; which blocks they make is seen in the products."""
    return [(result.blocks.order, ours(*args).flatten().argsort(stable=True).int())]


def _rotary(args: Any, kwargs: Any, changed: Any, result: Any) -> Pairs:
    query, key, value, cos_sin, caches, slots, *rest = args
    norms, eps = (*rest, None, 0.0)[:2] if len(rest) < 2 else rest
    if norms is not None:
        query, key = (rms_norm_ref(x.double(), weight.double(), eps) for x, weight in zip((query, key), norms, strict=True))
    found: Pairs = [(result, rotary_ref(query.double(), *cos_sin))]
    rotary_store_ref(query, key, value, cos_sin, caches, slots)
    for cache, want in zip(changed[4], caches, strict=True):
        found.append((_numbers(cache, slots, key.dtype), _numbers(want, slots, key.dtype)))
    return found


def _numbers(blocks: Blocks, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes as numbers of 16 bits: where a sum rounds otherwise in bfloat16, its code may be the next one."""
    coarse = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
    stored = dequantize_ref(blocks, coarse) if isinstance(blocks, QuantizedBlocks) else blocks
    return stored.flatten(0, 1)[slots]


def _draws(args: Any, kwargs: Any, changed: Any, result: Any) -> Pairs:
    logits, tokens, draws = args
    return [(changed[1], draw_ref(logits, tokens, draws))]


DEFINITIONS: dict[str, Callable[[Any, Any, Any, Any], Pairs]] = {
    "paged_attention_triton": _attention,
    "clamped_swiglu_triton": lambda args, _, changed, result: [(result, clamped_swiglu_ref(args[0].double(), *args[1:]))],
    "silu_mul_triton": lambda args, _, changed, result: [
        (result, silu_mul_ref(args[0].double())),
        *_with_sums(result, changed[1] if len(changed) > 1 else None),
    ],
    "group_sums_triton": lambda args, _, changed, result: [(result, group_sums_ref(args[0], args[1]))],
    "routes_triton": _routes,
    "experts_matmul_triton": _experts,
    "combine_triton": lambda args, _, changed, result: [(result, combine_ref(args[0].double(), args[1]))],
    "head_matmul_triton": lambda args, _, changed, result: [(result, head_matmul_ref(args[0].double(), args[1].double()))],
    "int8_matmul_triton": lambda args, _, changed, result: [(result, int8_matmul_ref(args[0].double(), *args[1:]))],
    "awq_matmul_triton": lambda args, _, changed, result: [(result, awq_matmul_ref(args[0].double(), *args[1:]))],
    "awq_dequantize_triton": lambda args, _, changed, result: [(result, awq_dequantize_ref(*args))],
    "pairs_matmul_triton": _pairs,
    "pairs_dequantize_triton": lambda args, _, changed, result: [
        (result[:, : args[0].inputs], awq_dequantize_ref(*unpack_pairs(args[0]))),
    ],
    "rms_norm_triton": _norm,
    "add_rms_norm_triton": _add_norm,
    "layer_norm_triton": lambda args, _, changed, result: [(result, layer_norm_ref(*args))],
    "add_scaled_norm_triton": _add_scaled_norm,
    "rotary_store_triton": _rotary,
    "draw_tokens_triton": _draws,
}
