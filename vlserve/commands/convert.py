"""`vlserve convert`: the command line of vlserve/convert."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from shlex import quote

from vlserve.config import EngineConfig

HELP = "Write an InternVL checkpoint in its other format: OpenGVLab's own, or transformers'."
DESCRIPTION = """\
Write an InternVL checkpoint in its other format: OpenGVLab's own (model_type internvl_chat), or transformers' (internvl,
as the '-hf' editions). The weights are the same, quantised ones too, and are read and written one tensor at a time.
vlserve serves both formats; this is for programs that read only one.
"""
EXAMPLE = """\
examples:
  vlserve convert OpenGVLab/InternVL2_5-8B internvl2_5-8b-hf --to hf
  vlserve convert OpenGVLab/InternVL3-8B-hf internvl3-8b --to original

InternLM2 and InternLM3 become a Llama, which is what they compute, and a Llama stays one on the way back. What a format
cannot say is refused by its key: ps_version v1, pad2square, a picture without thumbnail; other means of pixels; decoders
that OpenGVLab's format has not. OUT appears when it is whole: what is under way is in a folder .OUT.partial-* beside it,
which Ctrl-C and errors remove.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EXAMPLE
    options = EngineConfig.__dataclass_fields__
    parser.add_argument("model", metavar="MODEL", help=options["model"].metadata["help"])
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new or empty")
    parser.add_argument("--to", required=True, choices=("hf", "original"), help="the format to write")
    parser.add_argument("--revision", metavar="TEXT", help=options["revision"].metadata["help"])


def run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleaned up after like Ctrl-C
    from vlserve.convert.run import convert

    written, *notes = convert(options.model, options.out, options.to, options.revision)
    print(written)
    for note in notes:
        print(f"note: {note}")
    print(f"serve it with: vlserve serve {quote(str(options.out))}")
    return 0
