"""What machines must have in common before their ranks compute together."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from vlserve.config import EngineConfig
from vlserve.engine.rendezvous import _compare, _identity
from vlserve.errors import EngineError

# what each machine may have its own way, or only rank 0 looks at
OWN = {"model", "revision", "node_rank", "rdzv_endpoint", "device", "threads", "kv_cache_gib", "gpu_memory_utilization", "overlap"}
OWN |= {"prefix_caching", "on_rank_failure", "rendezvous_timeout_s", "load_timeout_s", "step_timeout_s"}


def test_every_option_is_shared_or_a_machines_own() -> None:
    known = _identity(EngineConfig()).keys() | OWN
    assert {field.name for field in fields(EngineConfig)} <= known


def test_machines_that_share_experts_out_differently_are_told() -> None:
    mine = EngineConfig(expert_parallel=True)
    with pytest.raises(EngineError, match="machine 1 was not started like this one: expert_parallel is True here and False there"):
        _compare(_identity(mine), _identity(replace(mine, expert_parallel=False)), 1)
