"""Whole models: their floors, and on a device their times, memory and transformers' times beside them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.cards import CARDS, floor
from benchmarks.gpu.kernels import ERRORS, Rates, Report, first_line
from benchmarks.gpu.models import TOLERANCE, Driver, Transformers, build_model, encode_seconds
from benchmarks.gpu.sizes import TILES, TINY, Sizes, Work
from benchmarks.gpu.steps import BATCHES, CONTEXT, WEIGHTS, step_name

STEP_TOKENS = 8192  # of a prefill, at most


def prompt_tokens(batch: int) -> int:
    return min(CONTEXT, STEP_TOKENS // batch)


def needed_bytes(sizes: Sizes, weights: str, batch: int) -> int:
    """Weights with both tables, keys and values, logits and activations, and the encoder, roughly."""
    sight = sizes.encoder
    encoder = 2 * sight.layers * (4 * sight.hidden**2 + 2 * sight.hidden * sight.ffn) + 2 * 5 * sight.hidden * sizes.hidden
    tables = 2 * sizes.vocab * sizes.hidden  # the second one; the first is among what a step reads
    widest = STEP_TOKENS * 3 * 2 * (sizes.ffn + sizes.hidden)
    return sizes.step_bytes(weights) + tables + encoder + batch * CONTEXT * sizes.token_bytes() + widest


def plan_models(models: list[Sizes], report: Report) -> None:
    """Floors of every step on the named cards."""
    for sizes in models:
        for weights in WEIGHTS:
            for batch in BATCHES:
                for name, work, tokens in works(sizes, weights, batch):
                    floors = {card.name: card.floor(work) for card in CARDS.values()}
                    row = {
                        "model": sizes.name,
                        "weights": weights,
                        "batch": batch,
                        "what": name,
                        "bytes": work.bytes,
                        "flops": work.flops,
                    }
                    row |= {"floor_ms": {card: 1e3 * seconds for card, seconds in floors.items()}}
                    row |= {"memory_gb": needed_bytes(sizes, weights, batch) / 1e9}
                    report.models.append(row)
                    texts = ", ".join(f"{card} {1e3 * s:.3f} ms ({tokens / s:.0f} tok/s)" for card, s in floors.items())
                    report.say(f"{sizes.name} {weights:5}{name}: {work.bytes / 1e9:.3f} GB, at least {texts}")
        flops = TILES * sizes.encoder.flops(sizes.hidden)
        rates = {card.name: card.rate / flops for card in CARDS.values()}
        report.models.append({"model": sizes.name, "what": "encode", "flops": flops, "most_images_per_s": rates})
        texts = ", ".join(f"{card} {rate:.0f}" for card, rate in rates.items())
        report.say(f"{sizes.name} pictures of {TILES} tiles a second at most: {texts}")


def works(sizes: Sizes, weights: str, batch: int) -> Iterator[tuple[str, Work, int]]:
    """(what, its work, tokens that it gives or takes) of a decode step and a prefill."""
    yield step_name(batch), sizes.decode(weights, batch, CONTEXT), batch
    tokens = prompt_tokens(batch)
    yield f"prefill, {batch} x {tokens}", sizes.prefill(weights, batch, tokens), batch * tokens


def run_models(
    sizes: Sizes, device: torch.device, rates: Rates, report: Report, deadline: float, *, batches: tuple[int, ...] = BATCHES
) -> None:
    """Both forms one after the other, then transformers; each only if it fits and there is time."""
    others: dict[str, float] = {}
    for weights in ("transformers", *WEIGHTS):
        name = f"{sizes.name} {weights}"
        if time.monotonic() > deadline:
            report.skip(name, "the models' time is up, see --seconds")
            continue
        if device.type == "cuda":
            free, need = (
                torch.cuda.mem_get_info(device)[0],
                needed_bytes(sizes, WEIGHTS[0] if weights == "transformers" else weights, 1),
            )
            if need > free:
                report.skip(name, f"it needs about {need / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free")
                continue
        try:
            if weights == "transformers":
                others = transformers_times(sizes, device, report, batches)
            else:
                run_weights(sizes, weights, device, rates, report, batches, others)
        except torch.OutOfMemoryError:
            report.skip(name, "not enough memory")
        except ImportError as error:
            report.skip(name, first_line(error))
        except ERRORS as error:
            report.fail(name, f"{type(error).__name__}: {first_line(error)}")
        release(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def run_weights(
    sizes: Sizes,
    weights: str,
    device: torch.device,
    rates: Rates,
    report: Report,
    batches: tuple[int, ...],
    others: dict[str, float],
) -> None:
    model = build_model(sizes, weights, device)
    for batch in batches:
        driver = Driver(model, batch, CONTEXT)
        found = driver.difference()
        if not found.within(TOLERANCE):
            report.fail(
                f"{sizes.name} {weights}, batch {batch}", f"a prompt at once and its last token by itself differ: {found}"
            )
            return
        for name, work, tokens in works(sizes, weights, batch):
            least = floor(work, rates.bandwidth, rates.rate)
            is_decode = name.startswith("decode")
            seconds = driver.decode_seconds(CONTEXT) if is_decode else driver.prefill_seconds(prompt_tokens(batch))
            row: dict[str, Any] = {
                "model": sizes.name,
                "weights": weights,
                "batch": batch,
                "what": name,
                "milliseconds": 1e3 * seconds,
            }
            row |= {"tokens_per_s": tokens / seconds, "share_of_floor": least / seconds}
            text = f"{1e3 * seconds:9.2f} ms {tokens / seconds:10.0f} tok/s {least / seconds:5.0%} of the floor"
            if is_decode and device.type == "cuda":
                graph = driver.graph_seconds(CONTEXT)
                row |= {"graph_milliseconds": 1e3 * graph, "graph_share_of_floor": least / graph}
                text += f"; as a graph {1e3 * graph:.2f} ms, {least / graph:.0%}"
            if name in others:
                row["times_as_fast_as_transformers"] = others[name] / seconds
                text += f"; {others[name] / seconds:.2f}x transformers in bf16"
            report.models.append(row)
            report.say(f"{sizes.name} {weights:5}{name:34}{text}")
        del driver
    seconds = encode_seconds(model)
    least = TILES * sizes.encoder.flops(sizes.hidden) / rates.rate
    row = {
        "model": sizes.name,
        "weights": weights,
        "what": "encode",
        "images_per_s": 1 / seconds,
        "share_of_floor": least / seconds,
    }
    text = ""
    if device.type == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        text = f"; peak memory {row['peak_gb']:.1f} GB"
    report.models.append(row)
    report.say(
        f"{sizes.name} {weights:5}{1 / seconds:.1f} pictures of {TILES} tiles a second, {least / seconds:.0%} of the rate{text}"
    )


def transformers_times(sizes: Sizes, device: torch.device, report: Report, batches: tuple[int, ...]) -> dict[str, float]:
    """Seconds by what `works` calls them."""
    model, found = Transformers(sizes, device), {}
    for batch in batches:
        (decode, _, _), (prefill, _, _) = works(sizes, WEIGHTS[0], batch)
        try:
            found[decode] = model.decode_seconds(batch, CONTEXT)
            found[prefill] = model.prefill_seconds(batch, prompt_tokens(batch))
        except torch.OutOfMemoryError:
            report.skip(f"{sizes.name} transformers, batch {batch}", "not enough memory")
            break
    return found


def rehearse(report: Report) -> None:
    """The same code once with a tiny model on the CPU: what it times there means nothing and is thrown away."""
    aside = Report(say=lambda line: None)
    for weights in WEIGHTS:
        run_weights(TINY, weights, torch.device("cpu"), Rates(bandwidth=1e9, rate=1e9), aside, (2,), {})
    for line in aside.failed:
        report.fail("rehearsal on the CPU", line)
    if not aside.failed:
        report.say(f"a model of {TINY.hidden} channels decoded, prefilled and encoded on the CPU in {' and '.join(WEIGHTS)}")
