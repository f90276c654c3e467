"""What the engine asks of an encoder with its projector, and the encoders whose units are square tiles of one size.

Shapes: F features, L levels, C the decoder's hidden size, N tiles, S tile size in pixels, K features a tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from vlserve.vision.config import TILES_AT_ONCE
from vlserve.vision.image_config import ImageConfig
from vlserve.vision.pixels import Unit
from vlserve.vision.preprocess import Normaliser


class Tower(nn.Module, ABC):
    """Units in, features out; whole on every rank. It is built on torch's meta device, so its constructor computes nothing."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor, units: Sequence[Unit]) -> torch.Tensor:
        """Features [F, L, C] of the units, in order, on the tower's device and in its type.

        Args:
            pixels: [bytes] uint8, from anywhere: the units' numbers one after another.
        """

    @abstractmethod
    def targets(self) -> dict[str, torch.Tensor]:
        """A checkpoint's names, as `Model.rename` gives them, to the parameters, or parts of them, that they fill."""

    @abstractmethod
    def smallest(self) -> Unit:
        """A unit to try the encoder out with before the first request."""

    @abstractmethod
    def heaviest(self) -> list[Unit]:
        """The units that take the most memory in one call of `encode`; measured before the KV cache is sized."""

    @property
    def levels(self) -> int:
        """Levels of features: the first takes the place of the placeholders' embeddings, others enter deeper layers."""
        return 1

    @property
    def fixed_unit(self) -> Unit | None:
        """The unit where all units are alike, of which a few are then recorded as CUDA graphs; None where they differ."""
        return None

    def cost(self, unit: Unit) -> float:
        """What a unit takes to encode, in any measure; units are dealt out to the ranks by it."""
        return float(unit.num_bytes)


class TileTower(Tower):
    """All units are tiles [3, S, S]."""

    def __init__(self, image_config: ImageConfig) -> None:
        super().__init__()
        self.image_config = image_config
        self._normalise = Normaliser(image_config)

    @abstractmethod
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised tiles [N, 3, S, S] on the tower's device and in its type -> features [N, K, C]."""

    @property
    def fixed_unit(self) -> Unit:
        return self.image_config.unit

    def smallest(self) -> Unit:
        return self.fixed_unit

    def heaviest(self) -> list[Unit]:
        return [self.fixed_unit] * TILES_AT_ONCE

    def encode(self, pixels: torch.Tensor, units: Sequence[Unit]) -> torch.Tensor:
        weight = next(self.parameters())
        parts = pixels.view(len(units), *self.fixed_unit.shape).split(TILES_AT_ONCE)
        found: torch.Tensor | None = None
        for place, part in enumerate(parts):
            some = self.features(self._normalise(part.to(weight.device, non_blocking=True)).to(weight.dtype))
            if found is None:
                found = some if len(parts) == 1 else some.new_empty(len(units), *some.shape[1:])
            if len(parts) > 1:  # put into one tensor at once: all parts beside it would take the memory twice
                found[place * TILES_AT_ONCE :][: len(some)] = some
            del some
        assert found is not None
        return found.flatten(0, 1).unsqueeze(1)
