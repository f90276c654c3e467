"""What a picture is before an encoder sees it: units of uint8 numbers, each worth so many features. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Unit:
    """What an encoder takes as one: a tile [3, S, S], a whole resized picture [3, H, W], a pair of frames [2, 3, H, W].

    Units are what ranks share out among them; `num_features` of the decoder's tokens come of one.
    """

    shape: tuple[int, ...]
    num_features: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """One picture, or one video, ready for the encoder.

    Args:
        data: [bytes] uint8, the units' numbers one after another, contiguous.
        digest: 32 bytes over everything that decides the features: numbers, shapes, and settings that work on them later.
        kind: what the chat template calls it: image or video.
    """

    data: np.ndarray
    units: tuple[Unit, ...]
    digest: bytes
    kind: str = "image"

    def __post_init__(self) -> None:
        numbers = [number for unit in self.units for number in (unit.num_features, *unit.shape)]
        if not self.units or any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError(f"units {self.units[:3]}; expected one or more, of whole numbers above 0")
        if len(self.digest) != DIGEST_BYTES:
            raise ValueError(f"the digest has {len(self.digest)} bytes; expected {DIGEST_BYTES}")
        expected = sum(unit.num_bytes for unit in self.units)
        if self.data.nbytes != expected:
            raise ValueError(f"the units have {expected} bytes, and the data {self.data.nbytes}")

    @property
    def num_features(self) -> int:
        return sum(unit.num_features for unit in self.units)
