"""`draw_tokens` on a GPU: what top-k and top-p keep (triton_filter.py), a race in parts of the vocabulary, and its winner.

Letters: D draws, P parts of BLOCK ids. `settings` has a line of COLUMNS for each draw, in float64, which has every integer in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vlserve.kernels.sampling.noise import ROUNDS, WORD
from vlserve.kernels.sampling.triton_filter import COLUMNS, top_filter
from vlserve.kernels.sampling.types import Draw
from vlserve.kernels.upload import upload
from vlserve.kernels.with_triton import check_contiguous

BLOCK = 1024  # ids of a part


@triton.jit
def _noise(seed, number, start, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """noise.py's logarithms for the ids from `start`, a multiple of 4, on."""
    counters = start // 4 + tl.arange(0, BLOCK // 4)
    zeros = counters * 0
    first, second, third, fourth = tl.philox(seed, counters, zeros + number, zeros, zeros, ROUNDS)
    words = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
    share = tl.minimum((words.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355)
    return tl.log(tl.where(share < 0.0009765625, share + share * share / 2, -tl.log(1 - share)))


@triton.jit(do_not_specialize=["row_stride", "vocab", "num_cut"])
def _race(
    logits, tokens, settings, least, last, scores, winners, row_stride, vocab, num_cut,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Program (draw, part). Of the first num_cut draws those above `least` are kept, and of its equals those up to id `last`."""
    draw, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    asked = settings + draw * COLUMNS
    row = tl.load(asked).to(tl.int64)
    numbers = logits + row * row_stride
    largest = tl.load(numbers + tl.load(tokens + row))
    lowest = largest - tl.load(asked + 4).to(tl.float32)
    bound = tl.load(least + draw, mask=draw < num_cut, other=float("-inf"))
    last_equal = tl.load(last + draw, mask=draw < num_cut, other=vocab)
    start = part * BLOCK
    ids = start + tl.arange(0, BLOCK)
    given = tl.load(numbers + ids, mask=ids < vocab, other=float("-inf"))
    kept = ((given > bound) | ((given == bound) & (ids <= last_equal))) & (given >= lowest)
    best, winner = float("-inf"), start
    if tl.max(kept.to(tl.int32), 0) > 0:
        seed = tl.load(asked + 5).to(tl.int64) | (tl.load(asked + 6).to(tl.int64) << 32)
        noise = _noise(seed, tl.load(asked + 7).to(tl.int32), start, BLOCK, ROUNDS)
        raced = tl.where(kept, (given - largest) * tl.load(asked + 1).to(tl.float32) - noise, float("-inf"))
        best = tl.max(raced, 0)
        winner = tl.min(tl.where(raced == best, ids, start + BLOCK - 1), 0)
    tl.store(scores + draw * parts + part, best)
    tl.store(winners + draw * parts + part, winner)


@triton.jit(do_not_specialize=["parts"])
def _win(tokens, settings, scores, winners, parts, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """A program a draw writes the winner of all parts, and leaves the likeliest token where there is none."""
    draw, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    score = tl.load(scores + draw * parts + part, mask=part < parts, other=float("-inf"))
    best = tl.max(score, 0)
    of_best = (score == best) & (part < parts)
    winner = tl.load(winners + draw * parts + part, mask=of_best, other=2147483647)
    there = tl.load(settings + draw * COLUMNS).to(tl.int64)
    tl.store(tokens + there, tl.min(winner, 0).to(tl.int64), mask=best > float("-inf"))


def draw_tokens_triton(logits: torch.Tensor, tokens: torch.Tensor, draws: Sequence[Draw]) -> None:
    """As `draw_tokens`, which checks; rows of logits may lie apart."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if len(logits) == 1:  # which may have any stride; Triton compiles anew for others
        logits = logits[0].unsqueeze(0)
    launch(logits, tokens, *upload_settings(draws, logits.shape[1], logits.device))


def upload_settings(draws: Sequence[Draw], vocab: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """[D, COLUMNS] float64, those that top-k or top-p cut first, and how many these are."""
    cut = [draw for draw in draws if draw.cuts(vocab)]
    ordered = cut + [draw for draw in draws if not draw.cuts(vocab)]
    numbers = upload([number for draw in ordered for number in _line(draw, vocab)], torch.float64, device)
    return numbers.view(-1, COLUMNS), len(cut)


def launch(logits: torch.Tensor, tokens: torch.Tensor, settings: torch.Tensor, num_cut: int) -> None:
    """In place of `tokens`; settings: as `upload_settings` gives them."""
    check_contiguous(tokens=tokens, settings=settings)
    vocab, number, parts = logits.shape[1], len(settings), triton.cdiv(logits.shape[1], BLOCK)
    scores = torch.empty((number, parts), dtype=torch.float32, device=logits.device)
    winners = torch.empty((number, parts), dtype=torch.int32, device=logits.device)
    with torch.cuda.device_of(logits):
        least, last = top_filter(logits, tokens, settings, num_cut)
        _race[(number, parts)](
            *(logits, tokens, settings, least, last, scores, winners, logits.stride(0), vocab, num_cut),
            COLUMNS=COLUMNS,
            BLOCK=BLOCK,
            ROUNDS=ROUNDS,
            num_warps=4,
        )
        _win[(number,)](
            tokens, settings, scores, winners, parts, COLUMNS=COLUMNS, PARTS=triton.next_power_of_2(parts), num_warps=1
        )


def _line(draw: Draw, vocab: int) -> list[float]:
    """Row, 1 / temperature, top-k and top-p, which keep all where they are off, min-p's reach, the seed's words, number."""
    top_k = draw.top_k if 0 < draw.top_k < vocab else vocab
    words = draw.seed & WORD, draw.seed >> 32 & WORD
    return [draw.row, 1 / draw.temperature, top_k, draw.top_p if draw.top_p < 1 else 2.0, draw.reach, *words, draw.number]
