"""`vlserve bench tp`: measures tensor-parallel degrees, and says what follows. Light at the top: every command imports it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlserve.commands.flags import add_flags, given
from vlserve.config import EngineConfig
from vlserve.errors import ConfigError, EngineError, ModelError
from vlserve.plan.tp_plan import check_tp

if TYPE_CHECKING:
    from vlserve.commands.bench_advice import Advice
    from vlserve.commands.bench_measure import Degree, Load

HELP = "Measure a model on this machine: which tensor-parallel degree to choose."
DESCRIPTION = """\
Measure which tensor-parallel degree to choose for a model on this machine.

Each degree gets an engine of its own, one after another, since two would not fit into the memory of the
same devices. It is warmed up, then asked the same generated pictures and texts as the others, with each
number of requests at once in turn. What comes out: a table with throughput, latency and the share of time
in communication, the bytes on each device, and the advice that follows from them.
"""
EPILOG = """\
example:
  vlserve bench tp OpenGVLab/InternVL3-8B-hf --tp 1,2,4 --concurrency 1,16,64 --plot tp.png

The table's columns: requests at once; requests/s and tokens/s (of answers) of the engine, tokens/s per device;
seconds of a whole answer; milliseconds to the first token (preparing the pictures included) and of each later
one; the share of the engine's steps in communication between ranks; and the spread of tokens/s over the
repetitions, below which differences mean nothing. Choose a load like yours: long answers, many pictures and
many requests at once each favour another degree. Exit status 1: a degree could not run; the others are shown.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", choices=("tp",), help="what to choose: tp, the tensor-parallel degree")
    help = EngineConfig.__dataclass_fields__["model"].metadata["help"]
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=help)
    add = parser.add_argument
    add("--tp", dest="degrees", type=_numbers, required=True, metavar="N,N", help="degrees to compare, e.g. 1,2,4")
    add("--json", action="store_true", help="print one JSON document (seconds and bytes) instead of the tables")
    add("--plot", type=Path, metavar="FILE.png", help='draw the figures; needs the extra "bench": pip install "vlserve[bench]"')
    group = parser.add_argument_group("load")

    def number(flag: str, default: int, help: str, least: int = 1) -> None:
        group.add_argument(flag, type=_at_least(least), default=default, metavar="N", help=f"{help} (default: {default})")

    group.add_argument(
        "--concurrency", type=_numbers, default=(1, 16), metavar="N,N", help="requests at once, one level each (default: 1,16)"
    )
    number("--requests", 32, "requests in each repetition of each level")
    number("--repetitions", 3, "repetitions; the figures are their medians")
    number("--pictures", 1, "generated pictures in each request; 0: text only", least=0)
    group.add_argument(
        "--picture-size", type=_size, default=(640, 480), metavar="WxH", help="their size in pixels (default: 640x480)"
    )
    number("--prompt-tokens", 128, "tokens of each request's text, about; pictures come on top")
    number("--answer-tokens", 64, "tokens of each answer; models go on after their end of text", least=2)
    add_flags(parser, "engine", EngineConfig, without=("tp",))


def run(options: argparse.Namespace) -> int:
    from vlserve.commands import bench_report
    from vlserve.commands.bench_advice import advise

    load = _read_load(options)
    if options.plot:
        bench_report.check_plot(options.plot)
    engine = given(options, EngineConfig)
    check_degrees(options.degrees, engine)
    if not options.json:
        print(bench_report.describe(options.model, load), end="\n\n", flush=True)
        print(bench_report.header(), flush=True)
    degrees, failed = [], {}
    for tp in options.degrees:
        try:
            degrees.append(_measure(engine | {"tp": tp}, load))
        except (ConfigError, ModelError, EngineError) as error:  # the others may run: a model too large for one device, say
            failed[tp] = str(error)
        if not options.json:  # at once, so that what is measured is seen even if a later degree takes too long
            print("\n".join([f"{tp:2}  failed: {failed[tp]}"] if tp in failed else bench_report.lines(degrees[-1])), flush=True)
    advice = advise(degrees, devices_are_separate=_are_separate(degrees, options.threads)) if degrees else []
    if options.json:
        print(json.dumps(_document(options, load, engine, degrees, failed, advice), ensure_ascii=False))
    elif degrees:
        print("", *bench_report.memory_lines(degrees), "", *(bench_report.paragraph(one.text) for one in advice), sep="\n")
    if options.plot and degrees:
        bench_report.draw(degrees, options.model, options.plot)
    return 1 if failed else 0


def check_degrees(degrees: tuple[int, ...], engine: dict[str, Any]) -> None:
    """From config.json alone; raises ConfigError naming the degrees that the model cannot have, and those that it can."""
    from vlserve.models.checkpoint import find_folder, read_checkpoint

    checkpoint = read_checkpoint(find_folder(engine["model"], engine.get("revision")))
    for tp in degrees:
        config = EngineConfig(**engine, tp=tp)
        check_tp(checkpoint.config, tp, replicate_kv_heads=config.replicate_kv_heads, expert_parallel=config.expert_parallel)


def _measure(options: dict[str, Any], load: Load) -> Degree:
    """With a bar on a terminal."""
    from tqdm import tqdm

    from vlserve.commands.bench_measure import measure, num_answers

    with tqdm(total=num_answers(load), disable=not sys.stderr.isatty(), unit="answer", leave=False, delay=0.1) as bar:

        def on_answer(what: str) -> None:
            bar.set_description(f"tp {options['tp']}, {what}", refresh=False)
            bar.update()

        return measure(options, load, on_answer)


def _are_separate(degrees: list[Degree], threads: int | None) -> bool:
    """Whether each rank had a device, or CPU cores, of its own."""
    if all(degree.device.startswith("cuda") for degree in degrees):
        return True
    return threads is not None and threads * max(degree.tp for degree in degrees) <= (os.cpu_count() or 1)


def _document(
    options: argparse.Namespace,
    load: Load,
    engine: dict[str, Any],
    degrees: list[Degree],
    failed: dict[int, str],
    advice: list[Advice],
) -> dict[str, Any]:
    rows = {degree.tp: [{"tokens_per_s_per_device": row.tokens_per_s_per_device} for row in degree.rows] for degree in degrees}
    measured = [asdict(degree) for degree in degrees]
    for degree in measured:
        degree["rows"] = [row | more for row, more in zip(degree["rows"], rows[degree["tp"]], strict=True)]
    return {
        "model": options.model,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "engine": engine,
        "load": asdict(load),
        "degrees": measured,
        "failed": failed,
        "advice": [asdict(one) for one in advice],
    }


def _read_load(options: argparse.Namespace) -> Load:
    from vlserve.commands.bench_measure import Load

    if options.requests < max(options.concurrency):
        most = max(options.concurrency)
        raise ConfigError(f"--requests {options.requests} cannot be {most} at once (--concurrency); give {most} requests or more")
    names = ("requests", "concurrency", "pictures", "picture_size", "prompt_tokens", "answer_tokens", "repetitions")
    return Load(**{name: getattr(options, name) for name in names})


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between, each once, growing."""
    return tuple(sorted({_at_least(1)(part) for part in text.split(",")}))


def _at_least(least: int) -> Any:
    def read(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
        return int(text)

    return read


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return _at_least(1)(width), _at_least(1)(height)
