"""What calibration knows of a linear layer's inputs, and the error that a changed weight makes on them.

All tokens count, and none is kept: with the second moments H = E[x x^T] the expected squared error of a change D of the
weight is the sum over its rows of d H d^T. Shapes: T tokens, N outputs, K inputs, G groups.
"""

from __future__ import annotations

import torch

ROWS_AT_ONCE = 4096  # of a weight, which bounds the memory of intermediate results


class Inputs:
    """Collects one layer's inputs; `moments` and `mean_abs` are averages over the tokens seen."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._moments = torch.zeros(size, size, device=device)
        self._abs = torch.zeros(size, device=device)
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        """x [T, K]."""
        x = x.float()
        self._moments.addmm_(x.T, x)
        self._abs += x.abs().sum(0)
        self.count += len(x)

    def finish(self) -> None:
        """Sums to averages, in place; nothing is added afterwards."""
        self._moments /= self.count
        self._abs /= self.count

    @property
    def moments(self) -> torch.Tensor:
        """float32 [K, K]."""
        return self._moments

    @property
    def mean_abs(self) -> torch.Tensor:
        """float32 [K]."""
        return self._abs

    def divide(self, scales: torch.Tensor) -> None:
        """From now on the inputs are x / scales [K]."""
        self._moments /= scales.unsqueeze(0)
        self._moments /= scales.unsqueeze(1)
        self._abs /= scales

    def errors(self, change: torch.Tensor) -> torch.Tensor:
        """Expected squared error of each output for a change of the weight; change float32 [N, K] -> [N]."""
        return torch.cat([((part @ self._moments) * part).sum(1) for part in change.split(ROWS_AT_ONCE)])

    def blocks(self, group_size: int) -> torch.Tensor:
        """The moments within each group, [G, group, group]."""
        groups = len(self._moments) // group_size
        return torch.stack(
            [self._moments[i * group_size : (i + 1) * group_size, i * group_size :][:, :group_size] for i in range(groups)]
        )


def relative_error(weight: torch.Tensor, rounded: torch.Tensor, inputs: Inputs) -> float:
    """Of the layer's output: root of the mean squared error over the mean square; both weights float32 [N, K]."""
    error, size = inputs.errors(rounded - weight).double().sum(), inputs.errors(weight).double().sum()
    return float((error.clamp(min=0) / size).sqrt()) if size > 0 else 0.0
