"""The figures that matter, each as a fraction of its floor: at the rates that the card reaches, and at the data sheet's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.contact.isolated import CheckError, first_line
from benchmarks.contact.setting import Setting
from benchmarks.gpu.attention import attention
from benchmarks.gpu.cards import Card, card_of, floor
from benchmarks.gpu.case import Built, Case
from benchmarks.gpu.heads import head, int8_head
from benchmarks.gpu.kernels import Rates, measure_rates
from benchmarks.gpu.models import TOLERANCE, Driver, build_model, encode_seconds
from benchmarks.gpu.products import dense_kernel, product
from benchmarks.gpu.sampling import drawing, greedy
from benchmarks.gpu.sizes import MODELS, TILES, TINY, Sizes, Work
from vlserve.kernels.measure import Timer, by_outputs

ROWS = (1, 16, 64, 128)


def timings(setting: Setting) -> None:
    """Raises CheckError when a figure could not be had, once all have been tried."""
    sizes, scale = TINY if setting.is_rehearsed else MODELS["8b"], setting.scale
    failed = []
    with setting.device(), torch.inference_mode():
        torch.manual_seed(0)
        device = torch.device("cuda", 0)
        timer = Timer(device, runs=scale.runs)
        rates = measure_rates(timer, *((2**10, 32) if setting.is_rehearsed else ()))
        figures = Figures(setting, rates, card_of(torch.cuda.get_device_name(device)))
        if not setting.is_rehearsed:
            setting.found(figure="rates", bandwidth=rates.bandwidth, rate=rates.rate)
        for case in cases(sizes, scale.context):
            try:
                figures.take_case(case, device, timer)
            except Exception as error:  # noqa: BLE001  (the next one is tried)
                failed.append(case.name)
                setting.found(figure=case.name, error=first_line(error))
            torch.cuda.empty_cache()
        try:
            whole_model(setting, figures, sizes, device)
        except Exception as error:  # noqa: BLE001
            failed.append("whole model")
            setting.found(figure="whole model", error=first_line(error))
    if failed:
        raise CheckError(f"no figure of {'; '.join(failed)}")


def cases(sizes: Sizes, context: int) -> Iterator[Case]:
    name, many = sizes.name, 64 if sizes is not TINY else 2
    outputs, inputs = sizes.linears["gate_up_proj"]
    for rows in ROWS if sizes is not TINY else ROWS[:1]:
        yield product(name, f"gate_up_proj {outputs} x {inputs}", outputs, inputs, rows)
        yield dense(name, f"gate_up_proj {outputs} x {inputs}", outputs, inputs, rows)
    yield attention(sizes, many, 1, context, "auto")
    yield attention(sizes, 1, 1, 4 * context, "auto")
    yield attention(sizes, 1, 2 * context, 2 * context, "auto")
    yield head(name, sizes.vocab, sizes.hidden, 1)
    yield int8_head(name, sizes.vocab, sizes.hidden, 1)
    yield from (make(name, sizes.vocab, rows) for make in (greedy, drawing) for rows in (1, many))


def dense(model: str, name: str, outputs: int, inputs: int, rows: int) -> Case:
    """torch's product in 16 bits."""

    def build(device: torch.device) -> Built:
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) / inputs**0.5
        x = torch.randn(rows, inputs, device=device).bfloat16()
        return Built(
            run=lambda: F.linear(x, weight),
            want=lambda: by_outputs(lambda part: F.linear(x.double(), part.double()), weight),
        )

    return Case(
        model=model,
        kernel="16-bit product",
        shape=f"{name}, {rows} rows",
        work=Work(2 * (outputs * inputs + rows * (inputs + outputs)), 2 * rows * outputs * inputs),
        plan=lambda arch, multiprocessors: "torch's product",
        kernels=lambda card: [dense_kernel(outputs, inputs, rows)],
        build=build,
    )


class Figures:
    """Notes them; in a rehearsal, which times nothing, only that they were reached."""

    def __init__(self, setting: Setting, rates: Rates, card: Card | None) -> None:
        self._setting, self._rates, self._card = setting, rates, card

    def take_case(self, case: Case, device: torch.device, timer: Timer) -> None:
        built = case.build(device)
        found = built.difference()
        if not found.within(case.tolerance):
            raise CheckError(f"{found} from the definition; a wrong result gets no figure")
        self.take(case.name, timer(built.run), case.work)

    def take(self, name: str, seconds: float, work: Work, **more: Any) -> None:
        if self._setting.is_rehearsed:
            self._setting.found(figure=name, reached=True)
            return
        least = floor(work, self._rates.bandwidth, self._rates.rate)
        is_memory = work.bytes / self._rates.bandwidth >= work.flops / self._rates.rate
        row = {"microseconds": round(1e6 * seconds, 2), "limit": "memory" if is_memory else "arithmetic"}
        row |= {"of_measured_floor": round(least / seconds, 3)}
        row |= {"of_data_sheet_floor": round(self._card.floor(work) / seconds, 3) if self._card else None}
        self._setting.found(figure=name, **row, bytes=work.bytes, flops=work.flops, **more)


def whole_model(setting: Setting, figures: Figures, sizes: Sizes, device: torch.device) -> None:
    """A decode step in 4 bits, as a graph and as the host drives it, and a picture through the encoder."""
    context, steps = setting.scale.context, max(1, setting.scale.runs // 2)
    model = build_model(sizes, "awq", device)
    driver = Driver(model, 1, max(context, 40))
    found = driver.difference()
    if not found.within(TOLERANCE):
        raise CheckError(f"a prompt at once and its last token by itself differ: {found}")
    work = sizes.decode("awq", 1, context)
    name = f"{sizes.name} awq step, batch 1, context {context}"
    figures.take(f"{name}, graph", driver.graph_seconds(context, steps), work)
    figures.take(f"{name}, by the host", driver.decode_seconds(context, steps), work)
    flops = TILES * sizes.encoder.flops(sizes.hidden)
    figures.take(f"encoder, {TILES} tiles", encode_seconds(model), Work(0, flops))
