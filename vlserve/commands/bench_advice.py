"""From measured figures to advice on the tensor-parallel degree. Pure: it measures nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlserve.commands.bench_measure import Degree, Row

MARGIN = 0.05  # differences below are taken for noise, however quiet the repetitions were
WEIGHTS = ("vision", "decoder", "embedding")  # of the kinds of device bytes
HIGH_COMM_SHARE = 0.3
HIGH_SPREAD = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """`tp` is the degree that it speaks for (or, for slower and communication, of)."""

    topic: str  # comparison, latency, throughput_per_device, replicas, slower, communication, memory, noise
    tp: int | None
    text: str


def advise(degrees: Sequence[Degree], *, devices_are_separate: bool) -> list[Advice]:
    """What follows from the figures. Of degrees that differ by no more than noise the smallest is named.

    Args:
        degrees: those measured, all with the same levels of concurrency.
        devices_are_separate: each rank had a device, or CPU cores, of its own; then figures per device mean something.
    """
    degrees = sorted(degrees, key=lambda degree: degree.tp)
    few, many = [degree.rows[0] for degree in degrees], [degree.rows[-1] for degree in degrees]
    if len(degrees) == 1:
        text = f"Only tp {degrees[0].tp} was measured, so there is nothing to choose between; give several degrees to --tp."
        return [Advice(topic="comparison", tp=None, text=text), *_communication(degrees), *_noise(degrees)]
    advice = [_latency(few)]
    if devices_are_separate:
        best = _smallest_of_the_best(many, _per_device)
        advice += [_throughput_per_device(many, best), _replicas(many, best)]
    else:
        text = (
            "The ranks shared CPU cores, so the figures per device say nothing of throughput per device or of replicas. "
            "Give --threads so that the ranks of the largest degree fit into the cores."
        )
        advice.append(Advice(topic="replicas", tp=None, text=text))
    return [*advice, *_slower(few, many), *_communication(degrees), *_memory(degrees), *_noise(degrees)]


def _latency(few: Sequence[Row]) -> Advice:
    best = _smallest_of_the_best(few, _latency_of)
    text = (
        f"Latency: tp {best.tp}. With {_requests(best)} an answer takes {_each(few, lambda row: f'{row.answer_s:.3g} s')}; "
        f"with tp {best.tp} the first token comes after {1000 * best.ttft_s:.3g} ms and each later one takes "
        f"{1000 * best.token_s:.3g} ms."
    )
    return Advice(topic="latency", tp=best.tp, text=text)


def _throughput_per_device(many: Sequence[Row], best: Row) -> Advice:
    figures = _each(many, lambda row: f"{row.tokens_per_s_per_device:.4g}")
    text = f"Throughput per device: tp {best.tp}. Tokens/s per device with {_requests(best)}: {figures}."
    return Advice(topic="throughput_per_device", tp=best.tp, text=text)


def _replicas(many: Sequence[Row], best: Row) -> Advice:
    """`best` is the best per device: whether a larger degree's devices would do more as several engines of it."""
    multiples = [row for row in many if row.tp > best.tp and row.tp % best.tp == 0]
    larger = [row for row in multiples if _is_clear(row, best, _per_device)]
    if not larger:
        text = "Replicas: several servers of a smaller degree would do no clearly better with the same devices."
        return Advice(topic="replicas", tp=None, text=text)
    cases = []
    for row in larger:
        number = row.tp // best.tp
        cases.append(
            f"{row.tp} devices give {row.tokens_per_s:.4g} tokens/s as tp {row.tp}, and would give up to "
            f"{number * best.tokens_per_s:.4g} as {number} servers of tp {best.tp}"
        )
    text = (
        f"Replicas: when the model fits with tp {best.tp} and requests are many, further servers of tp {best.tp} are the better "
        f"use of devices. {_sentence(cases)} (computed, not measured: each with {_requests(best)})."
    )
    return Advice(topic="replicas", tp=best.tp, text=text)


def _slower(few: Sequence[Row], many: Sequence[Row]) -> list[Advice]:
    """Degrees that gain nothing over a smaller one, and lose somewhere."""
    advice = []
    for index, (latency, throughput) in enumerate(zip(few, many, strict=True)):
        for other_latency, other_throughput in zip(few[:index], many[:index], strict=True):
            pairs = ((latency, other_latency, _latency_of), (throughput, other_throughput, _per_engine))
            gains = any(_is_clear(other, row, cost) for row, other, cost in pairs)
            loses = any(_is_clear(row, other, cost) for row, other, cost in pairs)
            if loses and not gains:
                text = (
                    f"tp {latency.tp} is slower than tp {other_latency.tp}: {latency.answer_s:.3g} s an answer against "
                    f"{other_latency.answer_s:.3g} s with {_requests(latency)}, {throughput.tokens_per_s:.4g} tokens/s against "
                    f"{other_throughput.tokens_per_s:.4g} with {_requests(throughput)}. It is of use only where the model does "
                    "not fit otherwise."
                )
                advice.append(Advice(topic="slower", tp=latency.tp, text=text))
                break
    return advice


def _communication(degrees: Sequence[Degree]) -> list[Advice]:
    advice = []
    for degree in degrees:
        share, row = max(((row.comm_share or 0.0, row) for row in degree.rows), key=lambda pair: pair[0])
        if share >= HIGH_COMM_SHARE:
            text = (
                f"tp {degree.tp} spends {share:.0%} of its steps in communication with {_requests(row)}: "
                "a smaller degree, or a faster link between the devices, would use them better."
            )
            advice.append(Advice(topic="communication", tp=degree.tp, text=text))
    return advice


def _memory(degrees: Sequence[Degree]) -> list[Advice]:
    def most(degree: Degree) -> float:
        return max(sum(rank.get(kind, 0) for kind in WEIGHTS) for rank in degree.device_bytes) / 2**20

    figures = ", ".join(f"{most(degree):,.0f} MiB (tp {degree.tp})" for degree in degrees)
    text = (
        f"Memory: the weights on one device take {figures}; the vision encoder is whole on each. "
        "What a degree saves is room for the KV cache."
    )
    return [Advice(topic="memory", tp=min(degrees, key=most).tp, text=text)]


def _noise(degrees: Sequence[Degree]) -> list[Advice]:
    row = max((row for degree in degrees for row in degree.rows), key=lambda row: row.spread)
    if row.spread < HIGH_SPREAD:
        return []
    text = (
        f"Noise: between repetitions of tp {row.tp} with {_requests(row)} tokens/s differed by {row.spread:.0%}. Is the machine "
        "busy with something else? Measure again when it is quiet, or with more --requests and --repetitions."
    )
    return [Advice(topic="noise", tp=row.tp, text=text)]


def _latency_of(row: Row) -> float:
    return row.answer_s


def _per_engine(row: Row) -> float:
    return 1 / row.tokens_per_s


def _per_device(row: Row) -> float:
    return 1 / row.tokens_per_s_per_device


def _smallest_of_the_best(rows: Sequence[Row], cost: Callable[[Row], float]) -> Row:
    best = min(rows, key=cost)
    return min((row for row in rows if not _is_clear(row, best, cost)), key=lambda row: row.tp)


def _is_clear(worse: Row, better: Row, cost: Callable[[Row], float]) -> bool:
    """Whether `worse` costs more than noise explains."""
    return cost(worse) > cost(better) * (1 + max(MARGIN, worse.spread, better.spread))


def _requests(row: Row) -> str:
    return f"{row.concurrency} request{'s' if row.concurrency > 1 else ''} at once"


def _each(rows: Sequence[Row], figure: Callable[[Row], str]) -> str:
    return ", ".join(f"{figure(row)} (tp {row.tp})" for row in rows)


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]
