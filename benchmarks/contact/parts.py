"""The parts in the order of their worth, with the most seconds that each may take: six minutes together."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from benchmarks.contact.setting import Setting
from benchmarks.contact.sources import ENGINE

KERNELS = ("kernels", "benchmarks/gpu", "benchmarks/contact")
WHOLE = (*ENGINE, "vlserve/plan", "vlserve/demo", "benchmarks/contact", "benchmarks/internvl3_1b.py")


@dataclass(frozen=True, slots=True)
class Part:
    """`work`: module and function. `sources`: files and folders whose change makes it run again."""

    name: str
    limit_s: int
    about: str
    work: str
    sources: tuple[str, ...]
    has_reference: bool = False  # the CPU's answers, which `--prepare` computes beforehand

    @property
    def module(self) -> str:
        return self.work.partition(":")[0]

    def run(self, setting: Setting) -> None:
        """The module is imported here, if it was not before, so that one that cannot be is this part's failure."""
        getattr(import_module(self.module), self.work.partition(":")[2])(setting)


PARTS = (
    Part(
        "environment",
        15,
        "card, driver, versions, memory, topology; always runs",
        "benchmarks.contact.environment:environment",
        (),
    ),
    Part("kernels", 60, "every kernel against its definition in float64", "benchmarks.contact.kernels:kernels", KERNELS),
    Part(
        "eager", 45, "the demo, kernel by kernel, token for token as on the CPU", "benchmarks.contact.engines:eager", WHOLE, True
    ),
    Part("graphs", 25, "the same with CUDA graphs", "benchmarks.contact.engines:graphs", WHOLE),
    Part(
        "overlap",
        20,
        "the same with a step started before the one in front of it is read",
        "benchmarks.contact.engines:overlap",
        WHOLE,
    ),
    Part(
        "1b",
        60,
        "a checkpoint of 1B, in float32 and in bfloat16, against the CPU in float32",
        "benchmarks.contact.large:one_billion",
        WHOLE,
        True,
    ),
    Part(
        "forms",
        45,
        "AWQ, KV caches in int8 and fp8, the head in 8 bits, against the CPU",
        "benchmarks.contact.engines:forms",
        WHOLE,
        True,
    ),
    Part(
        "two-ranks",
        25,
        "the demo on two ranks of one device",
        "benchmarks.contact.engines:two_ranks",
        (*WHOLE, "tests/engine/ranks.py"),
    ),
    Part("memory", 20, "bytes of the 1B checkpoint against the plan", "benchmarks.contact.large:memory", WHOLE),
    Part(
        "timings",
        45,
        "the figures that matter, as fractions of their floors",
        "benchmarks.contact.timings:timings",
        (*WHOLE, "benchmarks/gpu"),
    ),
)
