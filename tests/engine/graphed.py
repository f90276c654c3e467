"""An engine as on CUDA, on the CPU: Triton's kernels are interpreted, and a recorder that does the work again stands for it."""

from __future__ import annotations

import pytest

from tests.rehearsal import interpreter
from vlserve.engine import runner
from vlserve.engine.cuda_graphs import Work
from vlserve.kernels import attention, gate, norms, rotary


class Again:
    """Records nothing: what replays is the work itself."""

    num_free_bytes = 1

    def __init__(self) -> None:
        self.num_recorded = 0

    def record(self, work: Work) -> Work:
        self.num_recorded += 1
        return work


def launch_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of torch's operators."""
    interpreter.install(monkeypatch)
    for module in (attention, norms, rotary, gate, runner):
        monkeypatch.setattr(module, "runs_triton", lambda x: True)
