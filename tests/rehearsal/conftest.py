from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.rehearsal.cuda import H100, Rehearsal, install
from tests.rehearsal.launches import Launches


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rehearsal]:
    rehearsal = Rehearsal(H100)
    install(monkeypatch, rehearsal)
    with rehearsal.entered():
        yield rehearsal
        rehearsal.shared.finish()


@pytest.fixture
def launches(card: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches(card.shared)
    found.install(monkeypatch)
    return found
