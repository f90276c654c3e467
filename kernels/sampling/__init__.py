"""Draws tokens: by kernels on a GPU, row by row elsewhere. Letters, and what is drawn: reference.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlserve.kernels.sampling.cpu import draw_tokens_cpu
from vlserve.kernels.sampling.types import Draw
from vlserve.kernels.with_triton import runs_triton


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
        from vlserve.kernels.sampling.triton import draw_tokens_triton

        return draw_tokens_triton(logits, tokens, draws)
    draw_tokens_cpu(logits, tokens, draws)
