"""`vlserve quantize`: the command line of vlserve/quantize, and its report as words."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from shlex import quote
from typing import Any

from vlserve.config import EngineConfig
from vlserve.quantize.settings import DEVICES, DTYPES, FORMATS, GROUP_SIZES, METHODS, Settings

HELP = "Write a checkpoint with the decoder's weights in 4 or 8 bits, calibrated on pictures and text."
DESCRIPTION = """\
Write a checkpoint with the decoder's weights in 4 or 8 bits, calibrated on pictures and text.

The linear layers of the decoder are quantised; the vision encoder, the projector, the embeddings, the norms and the head
stay as they are. Tensors keep the names of the checkpoint's format, and projections that it stores as one stay one. Layers
are read, quantised and written one at a time. What broke off, by Ctrl-C or by force, goes on with the same command, from
the layer where it was.
"""
EXAMPLE = """\
examples:
  vlserve quantize OpenGVLab/InternVL3-8B-hf internvl3-8b-awq
  vlserve quantize MODEL OUT --method gptq --format compressed-tensors --group-size 64 --calibration chats.jsonl

A line of the JSONL file is {"messages": [...]} as in OpenAI's chat API; pictures are data URLs, or paths, which start at
the file's folder. OUT gets config.json last: before that it is no checkpoint to anybody.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EXAMPLE
    options = EngineConfig.__dataclass_fields__
    default = {name: field.default for name, field in Settings.__dataclass_fields__.items()}
    parser.add_argument("model", metavar="MODEL", help=options["model"].metadata["help"])
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new or empty")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=default["method"],
        help="awq: scales by activation and clipping; gptq: error made up for by later weights; rtn: to nearest, "
        f"all in 4 bits; fp8: 8-bit floats with a scale for each output (default: {default['method']})",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="how weights are stored; default: awq for 4 bits, compressed-tensors for fp8"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=default["group_size"],
        help=f"inputs that share a scale; no meaning for fp8 (default: {default['group_size']})",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE.jsonl|generated|text",
        default=default["calibration"],
        help="conversations to calibrate on; generated: shapes drawn here, with questions; text: without pictures "
        "(default: generated, or text for a model that takes no pictures)",
    )
    for name, text in (
        ("samples", "conversations in all; every eighth is held out to measure with"),
        ("seed", "of generated and text"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", default=default[name], help=f"{text} (default: {default[name]})")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="what layers run in; auto: float32 on the CPU, bfloat16 on CUDA"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help=options["device"].metadata["help"])
    parser.add_argument("--revision", metavar="TEXT", help=options["revision"].metadata["help"])
    parser.add_argument(
        "--force", action="store_true", help="start afresh where work was broken off, and replace a checkpoint that is in OUT"
    )


def run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is done is kept, as with Ctrl-C
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    from vlserve.quantize.run import quantize

    try:
        report = quantize(settings)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on with {settings.out}", file=sys.stderr)
        raise
    print(describe(report))
    print(f"{settings.out}: the whole report is in report.json; serve it with: vlserve serve {quote(str(settings.out))}")
    return 0


def describe(report: dict[str, Any]) -> str:
    """The report as a table and what it comes to."""
    lines = ["layer  error   drift  worst linear layer"]
    for index, layer in enumerate(report["layers"]):
        name, error = max(layer["linear_errors"].items(), key=lambda pair: pair[1])
        lines.append(f"{index:5}  {layer['error']:6.2%} {layer['drift']:6.2%}  {name} {error:.2%}")
    lines.append("error: of what the layer adds; drift: of all that has been added up to there; on held-out samples")
    perplexity = report["perplexity"]
    lines.append(
        f"perplexity of {perplexity['tokens']} held-out tokens of {perplexity['of']}: "
        f"{perplexity['before']:.4f} before, {perplexity['after']:.4f} after"
    )
    accuracy = report["accuracy"]
    lines.append(
        f"given word for word: {accuracy['before']:.1%} of {accuracy['answers']} {perplexity['of']} before, "
        f"{accuracy['after']:.1%} after; first choice: {accuracy['tokens_before']:.1%} of the tokens before, "
        f"{accuracy['tokens_after']:.1%} after"
    )
    return "\n".join(lines)
