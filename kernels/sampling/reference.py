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

import torch

from vlserve.kernels.sampling.noise import log_noise_of_all
from vlserve.kernels.sampling.types import Draw


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
