"""`draw_tokens` by torch's operators: among the likeliest alone, or halving what there is where top-p wants more of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vlserve.kernels.sampling.noise import log_noise_of, log_noise_of_all
from vlserve.kernels.sampling.types import Draw

LIKELIEST = 1024  # tokens among which a CPU looks for top-p first


def draw_tokens_cpu(logits: torch.Tensor, tokens: torch.Tensor, draws: Sequence[Draw]) -> None:
    """As `draw_ref`, summed in float32, in place of `tokens`; the checks are `draw_tokens`'s."""
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
