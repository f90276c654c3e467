from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vlserve.ranks.shared_pixels
from tests.checkpoints import make_checkpoint
from tests.ranks.faults import MARK, add_path, nothing_left, write_hold


@pytest.fixture(scope="module", autouse=True)
def _old_objects_stay() -> None:
    """Every engine collects garbage when it starts, which would look through all modules of the process each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Random checkpoints by decoder and settings, each made once."""
    made: dict[str, Path] = {}

    def get(decoder: str = "qwen2", **settings: Any) -> Path:
        key = repr((decoder, sorted(settings.items(), key=str)))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(decoder), decoder, **settings)
        return made[key]

    return get


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of this test's own for what is temporary; nothing may be left there, and no rank."""
    temporary, shared = tmp_path / "t", tmp_path / "s"
    temporary.mkdir(), shared.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(vlserve.ranks.shared_pixels, "SHARED", shared)
    monkeypatch.setenv(MARK, str(tmp_path))
    yield temporary
    nothing_left(str(tmp_path), temporary, shared)


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Keeps a rank in a stage until it is ended."""

    def set_hold(stage: str, *, rank: int = 1, kind: str = "sleep") -> None:
        add_path(monkeypatch.setenv, write_hold(tmp_path / "hold"))
        monkeypatch.setenv("VLSERVE_HOLD", f"{kind},{stage},{rank}")

    return set_hold
