"""4-bit weights for tests, and how far products with them may be from their definition."""

from __future__ import annotations

import pytest
import torch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
INTERPRETED = [torch.float32, torch.float16]  # the interpreter computes bfloat16 on raw bits
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def weights(outputs: int, inputs: int, group: int, dtype: torch.dtype) -> Weights:
    """codes, scales and zeros; of several groups the first output's last one has scale 0, as padding has."""
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    scales = (torch.rand(outputs, inputs // group) / 10 + 0.01).to(dtype)
    scales[0, 1:][-1:] = 0
    return codes, scales, torch.randint(0, 17, scales.shape, dtype=torch.uint8)


def rms_ratio(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the error over that of the value."""
    return float((got.double() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt().clamp_min(1e-12))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written to is full of NaN, or of the largest whole number."""
    empty = torch.empty

    def fill(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", fill)
