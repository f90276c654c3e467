from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may reach for a network

import pytest
import torch

from tests.checkpoints import make_checkpoint


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
