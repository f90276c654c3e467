"""What named cards can do, by their data sheets, and how long work takes on them at least and by our own estimate.

The estimate adds to the floor what is known of our kernels without a GPU. It is arithmetic, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.sizes import Work

LAUNCH_S = 2e-6  # assumed: a kernel's start and end beside its work, in a CUDA graph
ATTAINABLE = 4.3 / 4.8  # a device-to-device copy on an H200 is known to reach 4.3 TB/s; the same share is assumed of the others
ISSUED = 0.75  # of the instructions that could be issued; assumed
TENSOR_CORES = 0.6  # of the data sheet's rate in bfloat16; assumed
LANES = 128  # threads' instructions that a multiprocessor issues a cycle
# At most, instructions a weight by the rows of a program; tests/kernels/test_compiled.py allows no more.
PER_WEIGHT = {16: 2.5, 32: 3.1, 64: 6.2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """`bandwidth` in bytes a second and `rate`, dense bfloat16 with sums in float32, in operations a second: NVIDIA's data sheet.

    `clock` is the one at which the data sheet's rate is reached with `per_cycle` operations of a multiprocessor.
    """

    name: str
    architecture: str
    bandwidth: float
    rate: float
    multiprocessors: int
    per_cycle: int

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

    def predict(self, work: Work) -> tuple[float, str]:
        """Seconds, and which term of them is the largest."""
        terms = {
            "memory": work.bytes / (ATTAINABLE * self.bandwidth),
            "tensor cores": work.flops / (TENSOR_CORES * self.rate),
            "instructions": work.instructions / (ISSUED * LANES * self.multiprocessors * self.clock),
        }
        launches = LAUNCH_S * work.launches
        reason = max(terms, key=lambda name: terms[name])
        return launches + terms[reason], reason if terms[reason] >= launches else "launches"


def floor(work: Work, bandwidth: float, rate: float) -> float:
    return max(work.bytes / bandwidth, work.flops / rate)


SOURCES = (
    "bandwidth and bfloat16 rates: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200 (HGX, per GPU, dense); "
    f"estimate: {ATTAINABLE:.0%} of the bandwidth, {TENSOR_CORES:.0%} of the rate, {ISSUED:.0%} of the instructions, and "
    f"{1e6 * LAUNCH_S:.0f} us a kernel, all assumed"
)
CARDS = {
    card.name: card
    for card in (
        Card(name="A100", architecture="sm_80", bandwidth=2.04e12, rate=312e12, multiprocessors=108, per_cycle=2048),
        Card(name="H100", architecture="sm_90", bandwidth=3.35e12, rate=989e12, multiprocessors=132, per_cycle=4096),
        Card(name="H200", architecture="sm_90", bandwidth=4.8e12, rate=989e12, multiprocessors=132, per_cycle=4096),
        Card(name="B200", architecture="sm_100", bandwidth=8e12, rate=2250e12, multiprocessors=148, per_cycle=8192),
    )
}
