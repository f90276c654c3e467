"""Keeps what the kernels' tests launch in covered.json, by file; whoever launches something can then ask whether a test has it.

A file's tests are held to what is written there: they launch nothing else, and, where all of them ran, nothing less.
`python -m tests.kernels.covered` writes it anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.kernels.covered import ROOT, read, renewed

REMEDY = "python -m tests.kernels.covered writes it anew"


@pytest.fixture(scope="module", autouse=True)
def _what_is_launched(request: pytest.FixtureRequest) -> Iterator[None]:
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    from tests.kernels.facts import facts
    from tests.kernels.signatures import signature_of

    found: set[str] = set()
    run = InterpretedFunction.run

    def noted(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if kernel.fn.__module__.startswith("vlserve."):
            found.add(facts(signature_of(kernel, args, kwargs)[0]))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = noted
    yield
    InterpretedFunction.run = run
    name = request.path.relative_to(ROOT).as_posix()
    if renewed(name, found):
        return
    known = read().get(name, set())
    assert found <= known, f"{name} launches what tests/kernels/covered.json lacks, {REMEDY}: {sorted(found - known)}"
    options = request.config.option
    if not any("::" in arg for arg in request.config.args) and not options.keyword and not options.markexpr and not options.lf:
        assert known <= found, f"{name} no longer launches what tests/kernels/covered.json has, {REMEDY}: {sorted(known - found)}"
