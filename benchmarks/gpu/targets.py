"""What the kernels are to reach, and how far they should (by arithmetic) or do (as measured).

A target is a time: that of a reference over a factor. The reference is the memory's ("bandwidth": the case's bytes at the rate
that a copy reaches), another kernel's, by the name that its rival has in the benchmark, or a whole step's or its floor's; the
factor says how many times as fast as that to be, so 80 % of the bandwidth is a factor of 0.8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.attention import attention
from benchmarks.gpu.cards import CARDS, Card
from benchmarks.gpu.case import Case
from benchmarks.gpu.elementwise import gate, norm, rotary
from benchmarks.gpu.experts import GPT_OSS_20B, QWEN3_30B, expert_product
from benchmarks.gpu.heads import head, int8_head
from benchmarks.gpu.predict import ATTAINABLE, Kernel, Prediction, predict
from benchmarks.gpu.products import dense_kernel, product, spread_out
from benchmarks.gpu.sampling import drawing, greedy
from benchmarks.gpu.sizes import MODELS, TILES, Sizes
from benchmarks.gpu.steps import CONTEXT, predict_step, step_name
from benchmarks.gpu.vision import encoder_norm

EVERY = tuple(CARDS)
HOPPER = ("H100", "H200")
SQUARE = 8192
# operations a second of others' causal prefill of 2048 tokens with 128 channels a head: FlashAttention-3 on an H100 by its paper
# (arXiv 2407.08608, figure 5); FlashAttention-2 on an A100 at 60 % of the rate, of the 50 to 73 % in its paper (arXiv 2307.08691)
FLASH_3, FLASH_2 = 521e12, 0.6 * CARDS["A100"].rate
# of which a decode step reads chosen experts' weights alone
EXPERTS = [(QWEN3_30B, form, 16) for form in QWEN3_30B.forms] + [(GPT_OSS_20B, "mxfp4", tokens) for tokens in (1, 16)]
BANDWIDTH, FLOOR, STEP = "bandwidth", "floor", "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`factors`: by card; one that is not there has no target. `key`: of the row that the benchmark measures, None where it has
    none: (model, kernel, shape) of a case, or (model, weights, step) of a whole step."""

    wording: str
    shape: str
    basis: str
    factors: dict[str, float]
    key: tuple[str, str, str] | None
    reference: Callable[[Card], float]  # seconds
    predicted: Callable[[Card], Prediction]
    step: tuple[str, str, str] | None = None  # the key of the step that the time is a share of

    def limit(self, card: str, reference: float) -> float | None:
        """Seconds to be reached on a card of that name; None where it has no target."""
        return reference / self.factors[card] if card in self.factors else None


def is_met(seconds: float | None, limit: float | None) -> bool | None:
    """None where that cannot be said."""
    if seconds is None or limit is None:
        return None
    return seconds <= limit


def targets() -> list[Target]:
    """All, in the order of a step; those of whole steps at the end."""
    model = MODELS["8b"]
    return [*_products(model), *_experts(), *_attention(model), *_by_bandwidth(model), *_sampling(model), _step(model)]


def target_cases() -> list[Case]:
    """What must be measured for the targets, beside whole steps."""
    model = MODELS["8b"]
    name, (outputs, inputs) = _widest(model)
    cases = [square(rows) for rows in (1, 16, 64, 128)]
    cases += [product("8b", name, outputs, inputs, rows) for rows in (1, 16, 1024)] + [spread_out("8b", name, outputs, inputs)]
    cases += [attention(model, *sizes, "auto") for sizes in ((64, 1, 1024), (1, 1, 4096), (1, 2048, 2048))]
    cases += [norm(model, 4096, adds=False), norm(model, 4096, adds=True), gate(model, 4096), rotary(model, 4096, "auto")]
    cases.append(encoder_norm(model, TILES))
    cases += [head("8b", model.vocab, model.hidden, rows) for rows in (1, 16)]
    cases += [int8_head("8b", model.vocab, model.hidden, 1), *(expert_product(*one) for one in EXPERTS)]
    return cases + [make("8b", model.vocab, rows) for make in (greedy, drawing) for rows in (1, 64)]


def square(rows: int) -> Case:
    return product("square", f"{SQUARE} x {SQUARE}", SQUARE, SQUARE, rows, torch.float16)


def _widest(model: Sizes) -> tuple[str, tuple[int, int]]:
    outputs, inputs = model.linears["gate_up_proj"]
    return f"gate_up_proj {outputs} x {inputs}", (outputs, inputs)


def _of_case(
    case: Case,
    wording: str,
    basis: str,
    factors: dict[str, float],
    reference: Callable[[Card], float] | None = None,
    step: tuple[str, str, str] | None = None,
) -> Target:
    """Without `reference` it is the time of the case's bytes."""
    return Target(
        wording=wording,
        shape=case.shape,
        basis=basis,
        factors=factors,
        key=(case.model, case.kernel, case.shape),
        reference=reference or (lambda card: case.work.bytes / (ATTAINABLE * card.bandwidth)),
        predicted=case.predict,
        step=step,
    )


def _share(case: Case, what: str, share: float) -> Target:
    return _of_case(case, f"{what}: {share:.0%} of the bandwidth", BANDWIDTH, dict.fromkeys(EVERY, share))


def _against_torch(case: Case, outputs: int, inputs: int, rows: int, wording: str, factors: dict[str, float]) -> Target:
    return _of_case(case, wording, "F.linear", factors, lambda card: predict([dense_kernel(outputs, inputs, rows)], card).seconds)


def _products(model: Sizes) -> list[Target]:
    name, (outputs, inputs) = _widest(model)
    found = []
    for rows in (1, 16):
        factors = {"A100": 2.3, "H100": 2.0, "H200": 2.0}
        wording = "4-bit product: 2.0 times torch's in 16 bits, on A100 2.3"
        found.append(_against_torch(square(rows), SQUARE, SQUARE, rows, wording, factors))
    for rows, factor in ((64, 1.4), (128, 1.0)):
        wording = f"4-bit product: {factor} times torch's in 16 bits"
        found.append(_against_torch(square(rows), SQUARE, SQUARE, rows, wording, dict.fromkeys(EVERY, factor)))
    for rows in (1, 16):
        found.append(_share(product("8b", name, outputs, inputs, rows), "4-bit product, weights of 64 MB and more", 0.55))
    found.append(_share(spread_out("8b", name, outputs, inputs), "4-bit weights spread out", 0.8))
    dense, factors = product("8b", name, outputs, inputs, 1024), dict.fromkeys(EVERY, 1 / 1.1)
    return [*found, _against_torch(dense, outputs, inputs, 1024, "4-bit product, many rows: 1.1 times torch's time", factors)]


def _experts() -> list[Target]:
    found = [expert_product(*one) for one in EXPERTS]
    return [_share(case, f"{case.model}: {case.kernel}", 0.55) for case in found]


def _attention(model: Sizes) -> list[Target]:
    long, one = attention(model, 64, 1, 1024, "auto"), attention(model, 1, 1, 4096, "auto")
    prefill = attention(model, 1, 2048, 2048, "auto")
    flashinfer = _of_case(
        long,
        "decode attention: 0.95 times FlashInfer",
        "FlashInfer",
        dict.fromkeys(EVERY, 0.95),
        lambda card: predict([Kernel(bytes=long.work.bytes)], card).seconds,
    )
    of_3, of_2 = dict.fromkeys(HOPPER, 0.6), {"A100": 0.85}
    return [
        _share(long, "decode attention, cache of 64 MB and more", 0.8),
        _share(one, "decode attention, one sequence", 0.6),
        flashinfer,
        _of_case(prefill, "prefill: 60% of FlashAttention-3", "FlashInfer", of_3, lambda card: prefill.work.flops / FLASH_3),
        _of_case(prefill, "prefill: 85% of FlashAttention-2", "SDPA", of_2, lambda card: prefill.work.flops / FLASH_2),
    ]


def _by_bandwidth(model: Sizes) -> list[Target]:
    names = {
        "norm": norm(model, 4096, adds=False),
        "sum and norm": norm(model, 4096, adds=True),
        "gate": gate(model, 4096),
        "rotary embedding and cache": rotary(model, 4096, "auto"),
        "encoder's scale, sum and norm": encoder_norm(model, TILES),
    }
    found = [_share(case, f"{name}, 16 MB and more", 0.85) for name, case in names.items()]
    found += [_share(head("8b", model.vocab, model.hidden, rows), "head in 16 bits", 0.85) for rows in (1, 16)]
    return [*found, _share(int8_head("8b", model.vocab, model.hidden, 1), "head in 8 bits", 0.85)]


def _sampling(model: Sizes) -> list[Target]:
    found, factors = [], dict.fromkeys(EVERY, 1 / 0.02)
    for batch in (1, 64):

        def whole(card: Card, batch: int = batch) -> float:
            return predict_step(model, "awq", batch, card).seconds

        step = "8b", "awq", step_name(batch)
        found.append(_of_case(greedy("8b", model.vocab, batch), "greedy sampling: 2% of a step", STEP, factors, whole, step))
        drawn = drawing("8b", model.vocab, batch)
        found.append(_of_case(drawn, f"{drawn.kernel}: 2% of a step", STEP, factors, whole, step))
    return found


def _step(model: Sizes) -> Target:
    return Target(
        wording="step of InternVL3-8B in 4 bits: 55% of its floor's speed",
        shape=step_name(1),
        basis=FLOOR,
        factors=dict.fromkeys(EVERY, 0.55),
        key=("8b", "awq", step_name(1)),
        reference=lambda card: card.floor(model.decode("awq", 1, CONTEXT)),
        predicted=lambda card: predict_step(model, "awq", 1, card),
    )
