"""From logits to tokens: the likeliest, and those drawn with top-k, top-p and min-p."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.cards import Card
from benchmarks.gpu.case import Built, Case
from benchmarks.gpu.counted import counted
from benchmarks.gpu.predict import Grid, Kernel
from benchmarks.gpu.sizes import Work
from vlserve.kernels.measure import Difference
from vlserve.kernels.sampling import draw_tokens
from vlserve.kernels.sampling.reference import draw_ref
from vlserve.kernels.sampling.types import Draw
from vlserve.kernels.with_triton import runs_triton

# of a draw, as in sampling.triton and sampling.triton_filter: ids of a part, of a turn, and of a group
PART, TURN, ID_GROUP = 1024, 2048, 32
TOP_K, TOP_P, MIN_P = 40, 0.9, 0.05
# reads that follow from one another when that is cut from logits as below: 9 rounds among the groups, 5 and 6 with two reads each
# among what they leave, and 7 around them
CUT_READS = 9 + 2 * (5 + 6) + 7
# instructions a logit of each kernel's code without a loop, and of a part of the race where nothing is left
SURVEY, RACE, SKIPPED = 40, 114, 24
EXACT = Difference(0.0, 0.0)


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
            from vlserve.kernels.sampling.triton import launch, upload_settings

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
