from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rehearsal import interpreter
from tests.rehearsal.cuda import H100, Rehearsal, install
from tests.rehearsal.engines import Rig, make_tiny
from tests.rehearsal.judged import judge
from tests.rehearsal.launches import FOUND, Launches
from vlserve.kernels.int4_pairs.launch import device_of
from vlserve.vision import tower


@pytest.fixture(autouse=True)
def _judged() -> Iterator[None]:
    """Whatever a test launches is judged when it has ended, and the stand-ins are gone."""
    FOUND.clear()
    device_of.cache_clear()  # another card may have been the last one
    yield
    judge(FOUND)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rehearsal]:
    rehearsal = Rehearsal(H100)
    install(monkeypatch, rehearsal)
    with rehearsal.entered():
        yield rehearsal


@pytest.fixture
def launches(card: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches(card.shared)
    found.install(monkeypatch)
    interpreter.install(monkeypatch)
    return found


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A card for all tests of a file, so that they share engines. It has few multiprocessors, since a decode step has programs
    for each of them, and the encoder takes few tiles at once, since the peak is measured with so many."""
    with pytest.MonkeyPatch.context() as patch:
        rehearsal = Rehearsal(replace(H100, multi_processor_count=4))
        install(patch, rehearsal)
        launches = Launches(rehearsal.shared)
        launches.install(patch)
        interpreter.install(patch)
        patch.setattr(tower, "TILES_AT_ONCE", 2)
        device_of.cache_clear()
        with rehearsal.entered():
            yield Rig(rehearsal, launches)
    judge([launches])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the qwen2 kind that the interpreter is soon through with: a tile has four patches and one feature, and what
    is asked stands alone."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))
