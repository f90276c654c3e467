"""The suite does the same wherever it is started from."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.surroundings import SIGNALS, make_plain

STARTER = """
import os, signal, subprocess, sys
from tests.surroundings import SIGNALS
for number in SIGNALS:
    os.kill(os.getpid(), number)
print("still here", flush=True)
code = "import signal; print([signal.getsignal(n) != signal.SIG_IGN for n in %s], signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
subprocess.run([sys.executable, "-c", code % list(map(int, SIGNALS))], check=True)
"""


@pytest.mark.parametrize("way", ["ignored", "blocked"])
def test_a_suite_that_is_to_ignore_signals_does_and_what_it_starts_does_not(way: str) -> None:
    def deafen() -> None:
        for number in SIGNALS if way == "ignored" else ():
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if way == "blocked" else ())

    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", STARTER], cwd=root, capture_output=True, text=True, preexec_fn=deafen)
    assert done.stdout.splitlines() == ["still here", "[True, True, True] set()"], done.stderr


def test_what_is_meant_for_other_programs_is_taken_out() -> None:
    environment = {"https_proxy": "x", "NO_PROXY": "x", "VLSERVE_API_KEYS": "x", "SLURM_JOB_ID": "1", "PATH": "p", "TMPDIR": "t"}
    make_plain(environment)
    assert environment.keys() - {"TRITON_INTERPRET"} == {"PATH", "TMPDIR", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"}
