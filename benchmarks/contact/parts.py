"""The parts in the order of their worth, with the most seconds that each may take: six minutes together."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.contact import engines, environment, kernels, large, timings
from benchmarks.contact.asking import ENGINE
from benchmarks.contact.setting import Work

KERNELS = ("kernels", "benchmarks/gpu", "benchmarks/contact")
WHOLE = (*ENGINE, "vlserve/plan", "vlserve/demo", "benchmarks/contact", "benchmarks/internvl3_1b.py")


@dataclass(frozen=True, slots=True)
class Part:
    """`sources`: files and folders whose change makes it run again."""

    name: str
    limit_s: int
    about: str
    work: Work
    sources: tuple[str, ...]
    has_reference: bool = False  # the CPU's answers, which `--prepare` computes beforehand


PARTS = (
    Part("environment", 15, "card, driver, versions, memory, topology; always runs", environment.environment, ()),
    Part("kernels", 60, "every kernel against its definition in float64", kernels.kernels, KERNELS),
    Part("eager", 45, "the demo, kernel by kernel, token for token as on the CPU", engines.eager, WHOLE, True),
    Part("graphs", 25, "the same with CUDA graphs", engines.graphs, WHOLE),
    Part("overlap", 20, "the same with a step started before the one in front of it is read", engines.overlap, WHOLE),
    Part("bfloat16", 60, "a checkpoint of 1B, in bfloat16, against the CPU in float32", large.bfloat16, WHOLE, True),
    Part("forms", 45, "AWQ, KV caches in int8 and fp8, the head in 8 bits, against the CPU", engines.forms, WHOLE, True),
    Part("two-ranks", 25, "the demo on two ranks of one device", engines.two_ranks, (*WHOLE, "tests/engine/ranks.py")),
    Part("memory", 20, "bytes of the 1B checkpoint against the plan", large.memory, WHOLE),
    Part("timings", 45, "the figures that matter, as fractions of their floors", timings.timings, (*WHOLE, "benchmarks/gpu")),
)
