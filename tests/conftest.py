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
from tests.compatibility import Recorder
from tests.ranks.faults import MARK, add_path, nothing_left, write_hold


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models-page", metavar="PATH", help="write docs/models.md, by the tests that run and pass, to PATH")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config))


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
def temp() -> Iterator[Path]:
    """A TMPDIR of this test's own. The sockets in it may have names of about a hundred characters, and `tmp_path` has most of
    them when the user's name is long."""
    with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def places(temp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of this test's own for what is temporary; nothing may be left there, and no rank."""
    shared = tmp_path / "s"
    shared.mkdir()
    monkeypatch.setenv("TMPDIR", str(temp))
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    monkeypatch.setattr(vlserve.ranks.shared_pixels, "SHARED", shared)
    monkeypatch.setenv(MARK, str(tmp_path))
    yield temp
    nothing_left(str(tmp_path), temp, shared)


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Keeps a rank in a stage until it is ended."""

    def set_hold(stage: str, *, rank: int = 1, kind: str = "sleep") -> None:
        add_path(monkeypatch.setenv, write_hold(tmp_path / "hold"))
        monkeypatch.setenv("VLSERVE_HOLD", f"{kind},{stage},{rank}")

    return set_hold
