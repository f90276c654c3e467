"""Products with 4-bit weights, their dequantisation, and the 8-bit head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu import rivals
from benchmarks.gpu.cards import PER_WEIGHT
from benchmarks.gpu.case import Built, Case, Rival
from benchmarks.gpu.sizes import GROUP, Sizes, Work, int4_bytes
from vlserve.kernels.awq import awq_dequantize_ref, awq_matmul_ref
from vlserve.kernels.awq_pairs import ROWS, PairedWeights, pack_for_gpu, unpack_pairs
from vlserve.kernels.group_sums import INPUTS, group_sums
from vlserve.kernels.int8_head import int8_matmul, int8_matmul_ref, quantise_rows
from vlserve.kernels.launch import Launch, choose, split
from vlserve.kernels.measure import by_outputs
from vlserve.kernels.with_triton import runs_triton

FEW, MANY, DENSE = (1, 16), (32, 64, 128), (1024,)  # rows
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def product_cases(sizes: Sizes, *, quick: bool = False) -> Iterator[Case]:
    for name, (outputs, inputs) in sizes.linears.items():
        for rows in (1, 64) if quick else (*FEW, *MANY, *DENSE):
            yield product(sizes.name, f"{name} {outputs} x {inputs}", outputs, inputs, rows)
        if not quick:
            yield spread_out(sizes.name, f"{name} {outputs} x {inputs}", outputs, inputs)
    if not quick:  # the other arithmetic
        outputs, inputs = sizes.linears["qkv_proj"]
        for rows in (16, 64):
            yield product(sizes.name, f"qkv_proj {outputs} x {inputs}", outputs, inputs, rows, torch.float16)
    for rows in (1,) if quick else (1, 16, 64):
        yield head(sizes.name, sizes.vocab, sizes.hidden, rows)


def weights(outputs: int, inputs: int, device: torch.device, dtype: torch.dtype) -> Given:
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = (torch.rand(outputs, inputs // GROUP, device=device) / 100 + 0.001).to(dtype)
    return codes, scales, torch.randint(0, 16, scales.shape, dtype=torch.uint8, device=device)


def product(model: str, name: str, outputs: int, inputs: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """x [T, K] times 4-bit weights [N, K]^T; but for the output projection's, what makes x brings its sums."""
    is_dense, is_summed = rows > ROWS, not name.startswith("o_proj")

    def launch(arch: int, multiprocessors: int) -> tuple[Launch, int]:
        chosen = choose(f"sm_{arch}", rows, outputs)
        programs = -(-outputs // chosen.block_n) * -(-rows // chosen.block_t)
        return chosen, split(chosen, programs, -(-inputs // INPUTS), multiprocessors)

    def plan(arch: int, multiprocessors: int) -> str:
        if rows > ROWS:
            return "spread out, then torch's product"
        chosen, parts = launch(arch, multiprocessors)
        programs = -(-outputs // chosen.block_n), -(-rows // chosen.block_t), parts
        return f"{programs} programs of {chosen.block_t} x {chosen.block_n}, {chosen.warps} warps, {chosen.stages} stages"

    def instructions(arch: int, multiprocessors: int) -> float:
        if rows > ROWS:
            return 0.0
        block_t = launch(arch, multiprocessors)[0].block_t
        return PER_WEIGHT[block_t] * -(-rows // block_t) * outputs * inputs

    def build(device: torch.device) -> Built:
        given, x = weights(outputs, inputs, device, dtype), torch.randn(rows, inputs, device=device).to(dtype)
        packed = pack_for_gpu(*given)
        sums = group_sums(x, packed.empty_sums(x)) if is_summed and not is_dense else None
        return Built(
            run=partial(packed.matmul, x, sums),
            want=lambda: by_outputs(partial(awq_matmul_ref, x.double()), *given),
            rivals=lambda: int4_rivals(x, given, packed),
        )

    kind = "AWQ, dense path" if is_dense else "AWQ product"
    return Case(
        model=model,
        kernel=kind if dtype == torch.bfloat16 else f"{kind}, float16",
        shape=f"{name}, {rows} rows",
        work=Work(
            int4_bytes(outputs * inputs) + 2 * rows * (inputs + outputs),
            2 * rows * outputs * inputs,
            2 if is_dense or is_summed else 3,  # one adds up the parts
        ),
        plan=plan,
        build=build,
        instructions=instructions,
    )


def int4_rivals(x: torch.Tensor, given: Given, packed: PairedWeights) -> Iterator[Callable[[], Rival]]:
    def dense() -> Rival:
        weight = _spread_out(packed)[:, : packed.inputs].contiguous()
        return Rival(name="F.linear", run=lambda: F.linear(x, weight))

    yield dense
    if x.dtype == torch.bfloat16:
        yield lambda: rivals.int4pack(x, *given)
        yield lambda: rivals.gemlite(x, *given)
    yield lambda: rivals.marlin(len(given[0]), x)


def spread_out(model: str, name: str, outputs: int, inputs: int) -> Case:
    """4-bit weights as bfloat16."""

    def build(device: torch.device) -> Built:
        given = weights(outputs, inputs, device, torch.bfloat16)
        packed = pack_for_gpu(*given)
        return Built(
            run=lambda: _spread_out(packed),
            want=lambda: torch.cat([awq_dequantize_ref(c, s.double(), z) for c, s, z in _pieces(given)]),
        )

    return Case(
        model=model,
        kernel="AWQ dequantise",
        shape=name,
        work=Work(int4_bytes(outputs * inputs) + 2 * outputs * inputs, 0),
        plan=lambda arch, multiprocessors: f"{(-(-outputs // 64), -(-inputs // INPUTS))} programs",
        build=build,
    )


def _pieces(given: Given) -> Iterator[Given]:
    yield from zip(*(tensor.split(4096) for tensor in given), strict=True)


def _spread_out(packed: PairedWeights) -> torch.Tensor:
    if runs_triton(packed.words):
        from vlserve.kernels.awq_pairs_triton import pairs_dequantize_triton

        return pairs_dequantize_triton(packed)
    return awq_dequantize_ref(*unpack_pairs(packed))


def head(model: str, outputs: int, inputs: int, rows: int) -> Case:
    """x [T, K] times the head's 8-bit rows."""

    def build(device: torch.device) -> Built:
        dense = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5
        if device.type == "meta":  # nothing is computed there, and the blocks are many
            codes, scales = torch.empty_like(dense, dtype=torch.int8), torch.empty(outputs, device=device)
        else:
            codes, scales = quantise_rows(dense)
        x = torch.randn(rows, inputs, device=device).bfloat16()
        return Built(
            run=lambda: int8_matmul(x, codes, scales),
            want=lambda: by_outputs(partial(int8_matmul_ref, x.double()), codes, scales),
            rivals=lambda: iter([lambda: Rival(name="F.linear", run=lambda: F.linear(x, dense), want=lambda: _linear(x, dense))]),
        )

    block_t = min(64, max(16, 1 << (rows - 1).bit_length()))
    return Case(
        model=model,
        kernel="int8 head",
        shape=f"{outputs} x {inputs}, {rows} rows",
        work=Work(outputs * (inputs + 4) + 2 * rows * (inputs + outputs), 2 * rows * outputs * inputs),
        plan=lambda arch, multiprocessors: f"{(-(-outputs // 64), -(-rows // block_t))} programs of {block_t} x 64",
        build=build,
    )


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return by_outputs(lambda part: F.linear(x.double(), part.double()), weight)
