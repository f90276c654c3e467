"""Terminals without Unicode, two lines for wrong usage, and a Hub that cannot be reached."""

from __future__ import annotations

import io
import os
import socket
import sys
import types
from typing import Any

import pytest

from vlserve.commands.console import argument_text, use_what_the_console_has
from vlserve.commands.main import _say, main
from vlserve.config import SamplingParams
from vlserve.models.checkpoint import find_folder


def test_an_answer_on_a_terminal_that_knows_ascii_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", errors="surrogateescape", write_through=True))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("für 圆".encode()), "ascii", errors="surrogateescape"))
    use_what_the_console_has()
    delta = types.SimpleNamespace(text="un cercle doré 圆 🙂")
    pipeline: Any = types.SimpleNamespace(stream=lambda *arguments, **options: iter([delta]))
    assert _say(pipeline, [], SamplingParams()) == delta.text
    assert shown.getvalue() == b"un cercle dor? ? ?\n" and sys.stdin.read() == "für 圆"
    assert argument_text(os.fsdecode("für".encode())) == "für"


@pytest.mark.parametrize("arguments,message", [(["run"], "--prompt"), (["serve", "--port", "x"], "invalid int"), ([], "COMMAND")])
def test_wrong_usage_is_two_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and message in told and told.count("\n") == 2 and "--help" in told


def test_a_hub_that_cannot_be_reached_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[tuple[str, int]] = []

    def no_network(address: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(address)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr("vlserve.models.hub.getproxies", dict)
    assert main(["plan", "nobody/of-this-name"]) == 1
    told = capsys.readouterr().err
    assert "cannot be reached (Name or service not known)" in told and "Retrying" not in told and told.count("\n") == 1
    with pytest.raises(Exception, match="cannot be reached"):
        find_folder("nobody/of-this-name")
    assert len(tried) == 2 and tried[0][1] == 443
