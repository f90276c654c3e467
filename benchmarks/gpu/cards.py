"""What named cards can do, by NVIDIA's data sheets, and how long work takes on them at least; predict.py: how long it should."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.sizes import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """`bandwidth` in bytes a second and `rate`, dense bfloat16 with sums in float32, in operations a second: NVIDIA's data sheet.

    `clock` is the one at which the data sheet's rate is reached with `per_cycle` operations of a multiprocessor. `shared`: bytes
    of a multiprocessor that programs may take. Source of both and of `multiprocessors`: NVIDIA's tuning guides.
    """

    name: str
    architecture: str
    bandwidth: float
    rate: float
    multiprocessors: int
    per_cycle: int
    shared: int

    @property
    def clock(self) -> float:
        return self.rate / self.multiprocessors / self.per_cycle

    @property
    def arch(self) -> int:
        """As the attention's tiling wants it: 80 for sm_80."""
        return int(self.architecture.removeprefix("sm_"))

    def floor(self, work: Work) -> float:
        """Seconds that the data sheet's bandwidth and rate allow."""
        return floor(work, self.bandwidth, self.rate)


def floor(work: Work, bandwidth: float, rate: float) -> float:
    return max(work.bytes / bandwidth, work.flops / rate)


SOURCES = "bandwidth and bfloat16 rates: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200 (HGX, per GPU, dense)"
KB = 1024
CARDS = {
    card.name: card
    for card in (
        Card(
            name="A100",
            architecture="sm_80",
            bandwidth=2.04e12,
            rate=312e12,
            multiprocessors=108,
            per_cycle=2048,
            shared=164 * KB,
        ),
        Card(
            name="H100",
            architecture="sm_90",
            bandwidth=3.35e12,
            rate=989e12,
            multiprocessors=132,
            per_cycle=4096,
            shared=228 * KB,
        ),
        Card(
            name="H200",
            architecture="sm_90",
            bandwidth=4.8e12,
            rate=989e12,
            multiprocessors=132,
            per_cycle=4096,
            shared=228 * KB,
        ),
        Card(
            name="B200",
            architecture="sm_100",
            bandwidth=8e12,
            rate=2250e12,
            multiprocessors=148,
            per_cycle=8192,
            shared=228 * KB,
        ),
    )
}


def card_of(device_name: str) -> Card | None:
    """The card that a device's name, as the driver gives it, speaks of; None for others."""
    return next((card for name, card in CARDS.items() if name in device_name), None)
