"""Draws tokens from logits with temperature, top-k, top-p and min-p. Shapes: R rows of logits, V vocabulary.

The token is the largest of `(logit - largest) / temperature - log(noise)` over those that are kept, with exponential noise of its
own for each id (noise.py): that draws from the softmax (Yellott 1977), and what is left out changes nothing for the others. So a
row without top-k and top-p needs no order. Kept are the `top_k` likeliest, of equal ones those with the lowest ids; of them, by
falling likelihood, as many as it takes to have `top_p` of their probability; and what is at least `min_p` times as likely as the
likeliest. That one always is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlserve.kernels.noise import log_noise_of, log_noise_of_all
from vlserve.kernels.with_triton import runs_triton

LIKELIEST = 1024  # tokens among which a CPU looks for top-p first


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What is asked for a row; a top_k of 0 and a top_p of 1 leave all in. `number`: of the draws that the seed made before."""

    row: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int
    number: int

    def cuts(self, vocab: int) -> bool:
        """Whether top-k or top-p leaves out any of so many."""
        return 0 < self.top_k < vocab or self.top_p < 1

    @property
    def reach(self) -> float:
        """How far below the largest logit min-p keeps them."""
        return -self.temperature * math.log(self.min_p) if self.min_p > 0 else math.inf


def kept_ref(row: torch.Tensor, draw: Draw) -> torch.Tensor:
    """row [V] -> [V] bool; computed in float64 with a sort."""
    logits, ids = row.double().sort(descending=True, stable=True)
    probabilities = (logits / draw.temperature).softmax(0)
    places = torch.arange(len(row), device=row.device)
    keep = places < draw.top_k if draw.top_k > 0 else places >= 0
    if draw.top_p < 1:
        among = probabilities.masked_fill(~keep, 0)
        among = among / among.sum()
        keep &= among.cumsum(0) - among < draw.top_p  # the token that crosses the bound stays
    keep &= logits >= logits[0] - draw.reach
    return torch.empty_like(keep).scatter_(0, ids, keep)


def draw_ref(logits: torch.Tensor, tokens: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """logits [R, V] float32, tokens [R] int64, the likeliest -> with those of `draws` in place of them."""
    tokens = tokens.clone()
    for draw in draws:
        row = logits[draw.row]
        noise = log_noise_of_all(draw.seed, draw.number, len(row), row.device)
        scores = (row.double() - row.max()) / draw.temperature - noise
        tokens[draw.row] = scores.masked_fill(~kept_ref(row, draw), -math.inf).argmax()
    return tokens


def draw_tokens(logits: torch.Tensor, tokens: torch.Tensor, draws: Sequence[Draw]) -> None:
    """As `draw_ref`, summed in float32, in place of `tokens`: at top-p's very bound it may keep one more or one less.

    What is done for a row depends on its own draw only. The host waits for nothing on CUDA with Triton; a NaN gives some token.
    Raises ValueError when shapes or types do not fit.
    """
    if logits.ndim != 2 or tokens.shape != logits.shape[:1] or logits.dtype != torch.float32:
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype} and tokens {tuple(tokens.shape)}")
    if not draws:
        return
    if runs_triton(logits):
        from vlserve.kernels.draw_triton import draw_tokens_triton

        return draw_tokens_triton(logits, tokens, draws)
    for draw in draws:  # one at a time: a sum's rounding would depend on the company
        tokens[draw.row] = _draw(logits[draw.row], draw)


def _draw(row: torch.Tensor, draw: Draw) -> torch.Tensor:
    """row [V] -> its token, []."""
    below = row - row.max()
    if not draw.cuts(len(row)):
        noise = log_noise_of_all(draw.seed, draw.number, len(row), row.device)
        return _race(below, below >= -draw.reach, noise, draw)
    ids, keep = _cut(row, below, draw)
    below = below.gather(0, ids)
    noise = log_noise_of(draw.seed, draw.number, ids, len(row))
    place = _race(below, keep & (below >= -draw.reach), noise, draw)
    return ids.gather(0, place.view(1)).squeeze(0)


def _race(below: torch.Tensor, keep: torch.Tensor, noise: torch.Tensor, draw: Draw) -> torch.Tensor:
    """below: logits less their largest, [n] -> which wins, []."""
    return (below / draw.temperature).sub_(noise).masked_fill_(~keep, -math.inf).argmax()


def _cut(row: torch.Tensor, below: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """row [V], and less its largest -> ids [n], and which of them top-k and top-p keep."""
    vocab, ranks = len(row), _ranks(row)
    has_top_k = 0 < draw.top_k < vocab
    ids = ranks.topk(draw.top_k if has_top_k else min(LIKELIEST, vocab)).indices
    if draw.top_p >= 1:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    weights = (below / draw.temperature).exp_()
    first = weights.gather(0, ids)
    wanted = draw.top_p * (first if has_top_k else weights).sum()
    if has_top_k or bool(first.sum() >= wanted):
        return ids, first.cumsum(0) - first < wanted  # the token that crosses the bound stays
    ids = (ranks >= _least_rank(ranks, weights, wanted)).nonzero().squeeze(1)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _least_rank(ranks: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The largest of the ranks from which on weights have the sum `wanted`; each round leaves half of them."""
    while len(ranks) > 1:
        above = ranks > ranks.median()
        mass = weights[above].sum()
        is_enough = bool(mass >= wanted)
        half = above if is_enough else ~above
        ranks, weights, wanted = ranks[half], weights[half], wanted if is_enough else wanted - mass
    return ranks


def _ranks(row: torch.Tensor) -> torch.Tensor:
    """[V] float32 -> [V] int64, all different: the larger the logit, and of equal ones the lower the id, the larger."""
    bits = (row + 0.0).view(torch.int32)  # without -0
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return (ordered.long() << 32) + torch.arange(len(row) - 1, -1, -1, device=row.device)
