"""Decode steps of a whole model on a named card, as the sum of the predictions of their kernels. Nothing of this was ever timed.

A step is what a CUDA graph of it holds, with the head and greedy sampling behind it, and without the host.
"""

from __future__ import annotations

from benchmarks.gpu.attention import attention
from benchmarks.gpu.cards import CARDS, Card
from benchmarks.gpu.elementwise import gate, gate_with_sums, norm, norm_with_sums, rotary
from benchmarks.gpu.heads import head
from benchmarks.gpu.kernels import Report
from benchmarks.gpu.predict import Kernel, Prediction, predict
from benchmarks.gpu.products import dense_kernel, has_sums, product_kernels
from benchmarks.gpu.sampling import greedy
from benchmarks.gpu.sizes import Sizes

WEIGHTS, BATCHES, CONTEXT = ("bf16", "awq"), (1, 8, 64), 1024


def step_name(batch: int) -> str:
    return f"decode, batch {batch}, context {CONTEXT}"


def predict_step(sizes: Sizes, weights: str, batch: int, card: Card) -> Prediction:
    """A step of `batch` sequences with CONTEXT tokens each; `weights` is "bf16" or "awq"."""
    layer = Prediction()
    for name in sizes.linears:
        layer += predict(_linear(sizes, weights, name, batch, card), card)
    is_awq = weights == "awq"
    a_norm = norm_with_sums(sizes, batch) if is_awq else norm(sizes, batch, adds=True)
    a_gate = gate_with_sums(sizes, batch) if is_awq else gate(sizes, batch)
    for case in (rotary(sizes, batch, "auto"), attention(sizes, batch, 1, CONTEXT, "auto"), a_gate, a_norm, a_norm):
        layer += case.predict(card)
    before = [Kernel(bytes=4 * batch * sizes.hidden), Kernel(bytes=8 * batch * sizes.dim)]  # rows of the embedding, angles
    found = predict(before, card) + layer.times(sizes.layers) + norm(sizes, batch, adds=True).predict(card)
    found += head(sizes.name, sizes.vocab, sizes.hidden, batch).predict(card)
    return found + greedy(sizes.name, sizes.vocab, batch).predict(card)


def _linear(sizes: Sizes, weights: str, name: str, rows: int, card: Card) -> list[Kernel]:
    outputs, inputs = sizes.linears[name]
    if weights == "bf16":
        return [dense_kernel(outputs, inputs, rows)]  # torch's takes the bias as well
    bias = [Kernel(bytes=4 * rows * outputs)] if name == "qkv_proj" else []
    return product_kernels(card, outputs, inputs, rows, is_summed=has_sums(name)) + bias


def plan_steps(sizes: Sizes, report: Report) -> None:
    """Every step on every card, beside its floor."""
    report.say(f"decode steps of {sizes.name} at {CONTEXT} tokens of context, by arithmetic alone: nothing of this was timed.")
    report.say("A cell has tokens a second as predicted and at the floor, and what 15 % and more of the time is spent on")
    report.say(f"| weights | batch | {' | '.join(CARDS)} |")
    report.say(f"| --- | --- | {' | '.join('---' for _ in CARDS)} |")
    for weights in WEIGHTS:
        for batch in BATCHES:
            cells = []
            for card in CARDS.values():
                least, found = card.floor(sizes.decode(weights, batch, CONTEXT)), predict_step(sizes, weights, batch, card)
                row = {"model": sizes.name, "weights": weights, "batch": batch, "what": step_name(batch), "card": card.name}
                row |= {"kernels": found.kernels, "floor_ms": 1e3 * least, "predicted_ms": 1e3 * found.seconds}
                row |= {"parts_ms": {name: 1e3 * seconds for name, seconds in found.parts.items()}}
                row |= {"most_tokens_per_s": batch / least, "predicted_tokens_per_s": batch / found.seconds}
                report.steps.append(row)
                speed = f"{batch / found.seconds:.0f} of {batch / least:.0f} tok/s"
                cells.append(f"{speed}, {1e3 * found.seconds:.2f} ms: {', '.join(found.largest(0.15))}")
            report.say(f"| {weights} | {batch} | {' | '.join(cells)} |")
