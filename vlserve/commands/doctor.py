"""`vlserve doctor`: will this machine serve with so many ranks? Start-up's checks alone, without a model."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from vlserve.config import DEVICES, EngineConfig
from vlserve.errors import ConfigError

HELP = "Tell whether this machine will serve with N ranks: versions, devices, memory, limits, and a real all-reduce."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options = EngineConfig.__dataclass_fields__
    parser.add_argument("--tp", type=int, default=1, metavar="N", help=options["tp"].metadata["help"] + " (default: 1)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help=options["device"].metadata["help"] + " (default: auto)")
    parser.add_argument(
        "--timeout", type=float, default=60, metavar="SECONDS", help="how long nothing may happen in a check (default: 60)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document with all readings")


def run(options: argparse.Namespace) -> int:
    if not options.timeout >= 1:
        raise ConfigError(f"--timeout is {options.timeout:g}; expected 1 second or more")
    # the doctor's deadline comes before the ranks' own, which cannot see who is stopped
    config = EngineConfig(tp=options.tp, device=options.device, rendezvous_timeout_s=options.timeout + 10)
    import msgspec

    from vlserve.doctor.examine import examine

    with _ended_by_sigterm():
        report = examine(config, options.timeout, is_quiet=options.json)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    return 0 if report.passed else 1


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the ranks and removes the folder too, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
