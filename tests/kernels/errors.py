"""How far results may be from their definitions."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def rms_ratio(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the error over that of the value."""
    got, want = got.double(), want.double()
    return float((got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-12))
