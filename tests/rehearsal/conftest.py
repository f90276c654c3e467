from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rehearsal.cuda import H100, Rehearsal, install
from tests.rehearsal.judged import judge
from tests.rehearsal.launches import FOUND, Launches
from vlserve.kernels.int4_pairs.launch import device_of


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
    return found
