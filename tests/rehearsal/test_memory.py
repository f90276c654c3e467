"""What `vlserve plan` says of memory is what an engine of that size takes, and no step takes more than was set aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.reference import engine
from tests.rehearsal.cuda import H100, RTX4090, Card
from tests.rehearsal.engines import SMALL
from tests.rehearsal.memory import GIB, Trial, config_of, counted, planned, rehearsed, write_checkpoint
from vlserve.errors import ConfigError
from vlserve.plan.tp_plan import make_plan

CLOSE = 0.02
SHORT: dict[str, Any] = {"max_model_len": 12288, "max_num_seqs": 16}


@pytest.mark.parametrize(
    ("name", "tp", "card"),
    [("InternVL3-1B", 1, RTX4090), ("InternVL3-8B-AWQ", 1, RTX4090), ("InternVL3-78B", 8, H100)],
)
def test_planned_bytes_are_counted(name: str, tp: int, card: Card) -> None:
    """A step that took more than its share of the card would have run out of memory."""
    wanted, found = planned(config_of(name), card, tp, **SHORT)[1], counted(name, card, tp, **SHORT)
    assert found.kv_tokens == wanted.kv_tokens and found.kv_cache == wanted.kv_cache
    assert found.weights == pytest.approx(wanted.weights, rel=1e-3)
    assert found.peak == pytest.approx(wanted.peak, rel=CLOSE) and found.peak <= wanted.peak
    assert found.activations <= wanted.activations and found.graphs <= wanted.graphs


@pytest.mark.parametrize(
    ("name", "options"),
    [("InternVL3-38B", {}), ("InternVL3-1B", {"gpu_memory_utilization": 0.14})],
)
def test_what_does_not_fit_is_said_as_the_plan_says_it(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Weights before they are loaded, and a cache that is too small for one request."""
    plan = make_plan(config_of(name), tp=1, device_memory=24, **options)
    folder = write_checkpoint(tmp_path, config_of(name))
    with rehearsed(RTX4090) as card, pytest.raises(ConfigError) as refused:
        Trial(card, folder, 1, **options)
    assert plan.reason is not None and str(refused.value) == plan.reason
    assert card.memory().peak < 24 * GIB


def test_the_encoders_peak_is_measured_without_the_cache_of_the_trial(checkpoint: Callable[..., Path]) -> None:
    with rehearsed(H100) as card:
        runner = engine(checkpoint("qwen2"), device="cuda", **(SMALL | {"dtype": "bfloat16"})).runner
        tower, memory = runner.model.tower, card.memory()
        assert tower is not None
        units = tower.heaviest()
        before = memory.peak = memory.now
        with torch.inference_mode():
            tower.encode(torch.zeros(sum(unit.num_bytes for unit in units), dtype=torch.uint8), units)
        peak = memory.peak - before
        assert runner._measure_peak(32, 4) >= peak > 0
