"""What is limited by memory alone: norms, the gate, and rotary embedding with the write to the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.gpu.cards import Card
from benchmarks.gpu.case import TOLERANCE, Built, Case, Rival
from benchmarks.gpu.counted import KINDS as TYPES
from benchmarks.gpu.counted import counted
from benchmarks.gpu.predict import Grid, Kernel
from benchmarks.gpu.sizes import GROUP, KINDS, Sizes, Work, cache_bytes
from vlserve.kernels.gate import silu_mul
from vlserve.kernels.group_sums.reference import empty_sums, group_sums_ref
from vlserve.kernels.int4_pairs import ROWS as MOST_SUMMED
from vlserve.kernels.kv_cache.reference import dequantize_ref, quantize_ref
from vlserve.kernels.kv_cache.types import CODE_TYPES, SCALE_TYPE, Blocks, QuantizedBlocks
from vlserve.kernels.measure import Difference
from vlserve.kernels.norms import add_rms_norm, rms_norm
from vlserve.kernels.rotary import rotary_store

ROWS = (64, 4096)
PAGE, EPS = 16, 1e-6
# a number that was rounded once before may get the code beside its own, and in E4M3 these are far apart
TOLERANCES = {"auto": TOLERANCE, "int8": Difference(8e-3, 0.05), "fp8": Difference(0.015, 0.3)}


def elementwise_cases(sizes: Sizes, *, quick: bool = False) -> Iterator[Case]:
    for rows in ROWS[1:] if quick else ROWS:
        yield norm(sizes, rows, adds=False)
        yield norm(sizes, rows, adds=True)
        yield gate(sizes, rows)
        if rows <= MOST_SUMMED:
            yield norm_with_sums(sizes, rows)
            yield gate_with_sums(sizes, rows)
        for kind in KINDS:
            yield rotary(sizes, rows, kind)


def norm(sizes: Sizes, rows: int, *, adds: bool) -> Case:
    width = sizes.hidden
    num_bytes = (4 if adds else 2) * 2 * rows * width + 2 * width

    def kernel(card: Card) -> Kernel:
        warps = min(16, max(1, (1 << (width - 1).bit_length()) // 256))
        name = "add rms norm" if adds else "rms norm"
        return spread(num_bytes, rows, card, name, "bf16", f"width {width}", warps)

    def build(device: torch.device) -> Built:
        x, residual = (torch.randn(rows, width, device=device).bfloat16() for _ in range(2))
        weight = torch.rand(width, device=device).bfloat16()

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            return add_rms_norm(x, residual, weight, EPS) if adds else (rms_norm(x, weight, EPS), x)

        def want() -> torch.Tensor:
            total = (x + residual if adds else x).double()  # the sum is rounded before it is normed
            return torch.stack((normed(total, weight), total))

        def other() -> tuple[torch.Tensor, torch.Tensor]:
            total = x + residual if adds else x
            return F.rms_norm(total, weight.shape, weight, EPS), total

        rival = Rival(name="torch", run=other)
        return Built(run=run, want=want, observe=torch.stack, rivals=lambda: iter([lambda: rival]))

    return Case(
        model=sizes.name,
        kernel="add_rms_norm" if adds else "rms_norm",
        shape=f"{rows} x {width}",
        work=Work(num_bytes, 0),
        plan=lambda arch, multiprocessors: f"{rows} programs",
        kernels=lambda card: [kernel(card)],
        build=build,
    )


def gate(sizes: Sizes, rows: int) -> Case:
    width = sizes.ffn

    def build(device: torch.device) -> Built:
        x = torch.randn(rows, 2 * width, device=device).bfloat16()
        halves = x.chunk(2, dim=-1)

        def torchs() -> Rival:  # rounds in between
            return Rival(name="torch", run=lambda: F.silu(halves[0]) * halves[1])

        return Built(run=lambda: silu_mul(x), want=lambda: gated(x), rivals=lambda: iter([torchs]))

    return Case(
        model=sizes.name,
        kernel="silu_mul",
        shape=f"{rows} x {width}",
        work=Work(3 * 2 * rows * width, 0),
        plan=lambda arch, multiprocessors: f"{(rows, -(-width // 1024))} programs",
        kernels=lambda card: [
            spread(3 * 2 * rows * width, rows * -(-width // 1024), card, "silu mul", "bf16", "width 18944")  # counted at that one
        ],
        build=build,
    )


def norm_with_sums(sizes: Sizes, rows: int) -> Case:
    """As in front of a product with 4-bit weights."""

    def build(device: torch.device) -> Built:
        x, residual = (torch.randn(rows, sizes.hidden, device=device).bfloat16() for _ in range(2))
        weight = torch.rand(sizes.hidden, device=device).bfloat16()

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            sums = empty_sums(x, sizes.hidden, GROUP)
            return add_rms_norm(x, residual, weight, EPS, sums)[0], sums

        return Built(run=run, want=lambda: twice_summed(normed((x + residual).double(), weight)), observe=sums_and_summed)

    return with_sums(norm(sizes, rows, adds=True), rows * sizes.hidden, build)


def gate_with_sums(sizes: Sizes, rows: int) -> Case:
    """As in front of a product with 4-bit weights."""

    def build(device: torch.device) -> Built:
        x = torch.randn(rows, 2 * sizes.ffn, device=device).bfloat16()

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            sums = empty_sums(x, sizes.ffn, GROUP)
            return silu_mul(x, sums), sums

        return Built(run=run, want=lambda: twice_summed(gated(x)), observe=sums_and_summed)

    return with_sums(gate(sizes, rows), rows * sizes.ffn, build)


def with_sums(plain: Case, numbers: int, build: Callable[[torch.device], Built]) -> Case:
    work = Work(plain.work.bytes + numbers // GROUP * 4, plain.work.flops)

    def kernels(card: Card) -> list[Kernel]:
        return [replace(kernel, bytes=work.bytes) for kernel in plain.kernels(card)]

    return replace(plain, kernel=f"{plain.kernel}, sums", work=work, kernels=kernels, build=build)


def sums_and_summed(result: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The sums that were written, and those of the numbers that were."""
    numbers, sums = result
    return torch.stack((sums, group_sums_ref(numbers, torch.empty_like(sums))))


def twice_summed(numbers: torch.Tensor) -> torch.Tensor:
    """[T, K] float64 -> [2, K/128, 1, T]."""
    return numbers.unflatten(1, (-1, GROUP)).sum(2).t().unsqueeze(1).expand(2, -1, -1, -1)


def normed(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMS norm in float64."""
    return weight.double() * total / (total.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def gated(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up in float64."""
    first, second = x.double().chunk(2, dim=-1)
    return first / (1 + (-first).exp()) * second


def rotary(sizes: Sizes, rows: int, kind: str) -> Case:
    heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.dim
    num_bytes = rows * (4 * heads * dim + 4 * kv_heads * dim + cache_bytes(kv_heads, dim, kind) + 4 * dim + 8)

    def build(device: torch.device) -> Built:
        fused = torch.randn(rows, heads + 2 * kv_heads, dim, device=device).bfloat16()  # as the layer has them, side by side
        query, key, value = fused.split((heads, kv_heads, kv_heads), dim=1)
        angles = torch.rand(rows, dim // 2, device=device) * 100
        cos_sin = angles.cos(), angles.sin()
        caches = empty(-(-rows // PAGE), kv_heads, dim, kind, device), empty(-(-rows // PAGE), kv_heads, dim, kind, device)
        slots = torch.randperm(len(caches[0].scales if isinstance(caches[0], QuantizedBlocks) else caches[0]) * PAGE)
        slots = slots[:rows].to(device)
        return Built(
            run=lambda: rotary_store(query, key, value, cos_sin, caches, slots),
            observe=lambda result: torch.cat([result.double().flatten(), *(held(cache, slots) for cache in caches)]),
            want=lambda: torch.cat([turned(query, cos_sin).flatten(), kept(turned(key, cos_sin), kind), kept(value, kind)]),
        )

    return Case(
        model=sizes.name,
        kernel=f"rotary_store, cache {kind}",
        shape=f"{rows} tokens",
        work=Work(num_bytes, 0),
        plan=lambda arch, multiprocessors: f"{(rows, 3)} programs",
        kernels=lambda card: [spread(num_bytes, 3 * rows, card, "rotary and store", TYPES[kind], "dim 128")],  # as wide heads'
        build=build,
        tolerance=TOLERANCES[kind],
    )


def spread(num_bytes: int, programs: int, card: Card, name: str, types: str, setting: str, warps: int = 4) -> Kernel:
    """Programs without a loop ask for all that they take at once."""
    code = counted(name, types, setting, card.architecture)
    return Kernel(bytes=num_bytes, grid=Grid(programs=programs, ahead=num_bytes / programs, warps=warps, counted=code))


def empty(blocks: int, kv_heads: int, dim: int, kind: str, device: torch.device) -> Blocks:
    shape = (blocks, PAGE, kv_heads, dim)
    if kind == "auto":
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)
    return QuantizedBlocks(
        torch.zeros(shape, dtype=CODE_TYPES[kind], device=device), torch.zeros(shape[:-1], dtype=SCALE_TYPE, device=device)
    )


def held(cache: Blocks, slots: torch.Tensor) -> torch.Tensor:
    """What lies at the slots, as float64."""
    numbers = dequantize_ref(cache, torch.float64) if isinstance(cache, QuantizedBlocks) else cache.double()
    return numbers.flatten(0, 1)[slots].flatten()


def kept(numbers: torch.Tensor, kind: str) -> torch.Tensor:
    """[T, HK, D] as a cache of this kind keeps them by definition."""
    numbers = numbers.double()
    if kind == "auto":
        return numbers.flatten()
    codes, scales = quantize_ref(numbers, CODE_TYPES[kind])
    return dequantize_ref(QuantizedBlocks(codes, scales), torch.float64).flatten()


def turned(x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding in float64."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = (part.double()[:, None] for part in cos_sin)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
