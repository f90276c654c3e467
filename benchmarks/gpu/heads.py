"""The head, in 16 and in 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.cards import Card
from benchmarks.gpu.case import Built, Case, Rival
from benchmarks.gpu.counted import counted
from benchmarks.gpu.predict import Grid, Kernel
from benchmarks.gpu.products import dense_kernel
from benchmarks.gpu.sizes import Sizes, Work
from vlserve.kernels.head import KERNEL_ROWS, head_matmul, int8_matmul
from vlserve.kernels.head.reference import int8_matmul_ref, quantise_rows
from vlserve.kernels.measure import by_outputs

BLOCK_N = 64  # this and the next two are kernels/head/triton.py's, which only imports where Triton is
BLOCK_BYTES = 128  # of a row, a turn
STAGES = {True: 3, False: 5}  # by whether weights are codes


def head_cases(sizes: Sizes, *, quick: bool = False) -> Iterator[Case]:
    for rows in (1,) if quick else (1, 16, 64):
        yield int8_head(sizes.name, sizes.vocab, sizes.hidden, rows)
    for rows in (1,) if quick else (1, 16):
        yield head(sizes.name, sizes.vocab, sizes.hidden, rows)


def int8_head(model: str, outputs: int, inputs: int, rows: int) -> Case:
    """x [T, K] times the head's 8-bit rows."""

    def build(device: torch.device) -> Built:
        dense = _weight(outputs, inputs, device)
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

    return Case(
        model=model,
        kernel="int8 head",
        shape=f"{outputs} x {inputs}, {rows} rows",
        work=Work(outputs * (inputs + 4) + 2 * rows * (inputs + outputs), 2 * rows * outputs * inputs),
        plan=lambda arch, multiprocessors: _plan(outputs, rows),
        kernels=lambda card: [head_kernel(card, outputs, inputs, rows, is_coded=True)],
        build=build,
    )


def head(model: str, outputs: int, inputs: int, rows: int) -> Case:
    """x [T, K] times the head's rows in 16 bits; above KERNEL_ROWS it is torch's product."""

    def build(device: torch.device) -> Built:
        dense, x = _weight(outputs, inputs, device), torch.randn(rows, inputs, device=device).bfloat16()
        return Built(
            run=lambda: head_matmul(x, dense),
            want=lambda: _linear(x, dense),
            rivals=lambda: iter([lambda: Rival(name="F.linear", run=lambda: F.linear(x, dense))]),
        )

    is_ours = rows <= KERNEL_ROWS
    return Case(
        model=model,
        kernel="head",
        shape=f"{outputs} x {inputs}, {rows} rows",
        work=Work(2 * (outputs * inputs + rows * (inputs + outputs)), 2 * rows * outputs * inputs),
        plan=lambda arch, multiprocessors: _plan(outputs, rows) if is_ours else "torch's product",
        kernels=lambda card: [
            head_kernel(card, outputs, inputs, rows, is_coded=False) if is_ours else dense_kernel(outputs, inputs, rows)
        ],
        build=build,
    )


def head_kernel(card: Card, outputs: int, inputs: int, rows: int, *, is_coded: bool) -> Kernel:
    block_t, itemsize = _block_t(rows), 1 if is_coded else 2
    tiles = -(-outputs // BLOCK_N), -(-rows // block_t)
    code = counted("head", "bf16", f"weights {'i8' if is_coded else 'bf16'}, {block_t} rows", card.architecture)
    ahead = (STAGES[is_coded] - 1) * BLOCK_N * BLOCK_BYTES / tiles[1]
    return Kernel(
        bytes=outputs * (itemsize * inputs + 4 * is_coded) + 2 * rows * (inputs + outputs),
        flops=2 * rows * outputs * inputs,
        through_l2=tiles[0] * inputs * (tiles[1] * BLOCK_N * itemsize + 2 * rows),
        grid=Grid(programs=tiles[0] * tiles[1], ahead=ahead, warps=4, counted=code),
    )


def _block_t(rows: int) -> int:
    return min(64, max(16, 1 << (rows - 1).bit_length()))


def _plan(outputs: int, rows: int) -> str:
    block_t = _block_t(rows)
    return f"{(-(-outputs // BLOCK_N), -(-rows // block_t))} programs of {block_t} x {BLOCK_N}"


def _weight(outputs: int, inputs: int, device: torch.device) -> torch.Tensor:
    return torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return by_outputs(lambda part: F.linear(x.double(), part.double()), weight)
