"""Terminals as they are: ones that know no Unicode, and users who want two lines and not all flags."""

from __future__ import annotations

import argparse
import codecs
import io
import os
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Wrong usage is two lines; argparse shows every flag before it, and there are eighty."""

    command = ""  # of the subcommand whose flags are wrong

    def error(self, message: str) -> NoReturn:
        asked = f"{self.prog} {self.command}".strip()
        self.exit(2, f"{asked} --help lists all that there is\n{self.prog}: error: {message}\n")


def use_what_the_console_has() -> None:
    """What standard output cannot show becomes a question mark, not the end. Bytes that come in are UTF-8 where ASCII was set."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not knows_unicode(stream):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name == "ascii":
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")


def knows_unicode(stream: object) -> bool:
    return codecs.lookup(getattr(stream, "encoding", None) or "utf-8").name.startswith("utf")


def argument_text(argument: str) -> str:
    """A text from the command line, whose bytes are UTF-8 whatever the locale says."""
    return os.fsencode(argument).decode("utf-8", "replace")
