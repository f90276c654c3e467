"""What the decoder step's Triton kernels compile to, on cards that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled_attention"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    assert compiled and not [case for case in compiled if case["spills"]]


def test_decoding_stays_within_its_registers(compiled: list[dict[str, Any]]) -> None:
    decodes = [case for case in compiled if case["name"].startswith("decode")]
    assert {case["arch"] for case in decodes} == {80, 90, 100}
    assert not [case for case in decodes if case["registers"] > 170]


def test_keys_and_values_are_loaded_ahead_sixteen_bytes_at_once(compiled: list[dict[str, Any]]) -> None:
    """What is narrower are the page numbers."""
    for case in compiled:
        if case["name"].startswith(("decode", "prefill")):
            ahead = {width for width in case["loads"] if width.startswith("LDGSTS")}
            assert any(width.endswith(".128") for width in ahead), case
            assert not [width for width in ahead if width.endswith(".64")], case


def test_the_loop_has_few_instructions(compiled: list[dict[str, Any]]) -> None:
    """An H100 issues nine for each byte that it reads."""
    for case in compiled:
        if case["name"].startswith("decode"):
            most = 12 if "int8" in case["name"] or "e4m3" in case["name"] else 5
            assert 1 < case["per_number"] < most, case
