"""From hidden states to tokens: the head in 16 and in 8 bits, and sampling."""

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
from vlserve.kernels.draw import Draw, draw_ref, draw_tokens
from vlserve.kernels.head import KERNEL_ROWS, head_matmul
from vlserve.kernels.int8_head import int8_matmul, int8_matmul_ref, quantise_rows
from vlserve.kernels.measure import Difference, by_outputs
from vlserve.kernels.with_triton import runs_triton

BLOCK_N = 64  # this and the next two are head_triton's, which only imports where Triton is
BLOCK_BYTES = 128  # of a row, a turn
STAGES = {True: 3, False: 5}  # by whether weights are codes
# of a draw, as in draw_triton and top_filter_triton: ids of a part, of a turn, and of a group
PART, TURN, ID_GROUP = 1024, 2048, 32
TOP_K, TOP_P, MIN_P = 40, 0.9, 0.05
# reads that follow from one another when that is cut from logits as below: 9 rounds among the groups, 5 and 6 with two reads each
# among what they leave, and 7 around them
CUT_READS = 9 + 2 * (5 + 6) + 7
# instructions a logit of each kernel's code without a loop, and of a part of the race where nothing is left
SURVEY, RACE, SKIPPED = 40, 114, 24
EXACT = Difference(0.0, 0.0)


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


def greedy(model: str, outputs: int, rows: int) -> Case:
    """The likeliest tokens: logits of the head's type become float32, and the largest is taken."""

    def build(device: torch.device) -> Built:
        logits = torch.randn(rows, outputs, device=device).bfloat16()
        return Built(
            run=lambda: logits.float().argmax(-1),
            want=lambda: logits.double().amax(-1),  # of several that are equal, any may be taken
            observe=lambda ids: logits.gather(1, ids[:, None]).double()[:, 0],
        )

    return Case(
        model=model,
        kernel="greedy sampling",
        shape=f"{rows} x {outputs}",
        work=Work(2 * rows * outputs, 0),
        plan=lambda arch, multiprocessors: "torch's operators",
        kernels=lambda card: greedy_kernels(outputs, rows),
        build=build,
        tolerance=EXACT,
    )


def greedy_kernels(outputs: int, rows: int) -> list[Kernel]:
    return [Kernel(bytes=6 * rows * outputs), Kernel(bytes=4 * rows * outputs)]


def drawing(model: str, outputs: int, rows: int) -> Case:
    """Tokens drawn with top-k, top-p and min-p, from the likeliest on."""
    draws = [Draw(row=i, temperature=1.0, top_k=TOP_K, top_p=TOP_P, min_p=MIN_P, seed=i, number=0) for i in range(rows)]

    def build(device: torch.device) -> Built:
        logits = (2 * torch.randn(rows, outputs, device=device)).bfloat16()
        draw_them = partial(draw_tokens, draws=draws)
        if runs_triton(logits):  # without the settings' way there, which a graph cannot hold
            from vlserve.kernels.draw_triton import launch, upload_settings

            settings, num_cut = upload_settings(draws, outputs, device)
            draw_them = partial(launch, settings=settings, num_cut=num_cut)

        def run() -> torch.Tensor:
            numbers = logits.float()
            tokens = numbers.argmax(-1)
            draw_them(numbers, tokens)
            return tokens

        def want() -> torch.Tensor:
            return draw_ref(logits.float(), logits.argmax(-1), draws).double()

        return Built(run=run, want=want, observe=torch.Tensor.double)

    return Case(
        model=model,
        kernel="sampling with top-k, top-p and min-p",
        shape=f"{rows} x {outputs}",
        work=Work(2 * rows * outputs, 0),
        plan=lambda arch, multiprocessors: (
            f"{(rows, -(-outputs // TURN))}, {rows}, {(rows, -(-outputs // PART))}, {rows} programs"
        ),
        kernels=lambda card: [*greedy_kernels(outputs, rows), *drawing_kernels(card, outputs, rows)],
        build=build,
        tolerance=EXACT,
    )


def drawing_kernels(card: Card, vocab: int, rows: int) -> list[Kernel]:
    """A survey of the logits, the cut of each row, the race, and its winner. At most TOP_K parts have anything to race."""

    def grid(name: str, programs: int, ahead: float, warps: int) -> Grid:
        return Grid(programs=programs, ahead=ahead, warps=warps, counted=counted(name, "fp32", "", card.architecture))

    logits, turns, parts = rows * vocab, -(-vocab // TURN), -(-vocab // PART)
    groups = 4 * -(-vocab // ID_GROUP)  # bytes of a row's
    racing = min(parts, TOP_K) / parts
    return [
        Kernel(
            bytes=4 * logits + rows * groups,
            instructions=SURVEY * logits,
            grid=grid("survey of logits", rows * turns, 4 * TURN, 8),
        ),
        Kernel(bytes=2 * rows * groups, waits=CUT_READS, grid=grid("top-k and top-p", rows, groups, 16)),
        Kernel(
            bytes=4 * logits,
            instructions=(racing * RACE + (1 - racing) * SKIPPED) * logits,
            waits=4,  # the row, its likeliest token, that logit, and the end
            grid=grid("race", rows * parts, 4 * PART, 4),
        ),
        Kernel(bytes=8 * rows * parts, grid=grid("race's winner", rows, 8 * parts, 1)),
    ]


def _block_t(rows: int) -> int:
    return min(64, max(16, 1 << (rows - 1).bit_length()))


def _plan(outputs: int, rows: int) -> str:
    block_t = _block_t(rows)
    return f"{(-(-outputs // BLOCK_N), -(-rows // block_t))} programs of {block_t} x {BLOCK_N}"


def _weight(outputs: int, inputs: int, device: torch.device) -> torch.Tensor:
    return torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return by_outputs(lambda part: F.linear(x.double(), part.double()), weight)
