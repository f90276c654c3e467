"""What the plan says of each rank is what the rank holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.ranks import tp_engine
from vlserve.config import EngineConfig
from vlserve.engine.messages import Ready
from vlserve.engine.runner import Runner
from vlserve.plan.tp_plan import make_plan
from vlserve.ranks.memory_report import memory_lines

SHAPES: list[tuple[str, dict[str, Any], int]] = [
    ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}, 4),
    ("qwen2", {"tie_word_embeddings": True, "intermediate_size": 71}, 2),
    ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2}, 2),
    (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 65},
        3,
    ),
    ("mistral", {"norm_type": "rms_norm", "vision_qk_norm": True}, 2),
]


@pytest.mark.parametrize(("decoder", "settings", "tp"), SHAPES)
def test_planned_bytes_are_the_measured_ones(
    checkpoint: Callable[..., Path], decoder: str, settings: dict[str, Any], tp: int
) -> None:
    folder = checkpoint(decoder, **settings)
    config = json.loads((folder / "config.json").read_text())
    with tp_engine(folder, tp) as (engine, runners):
        plan = make_plan(config, tp=tp, dtype="float32", max_model_len=engine.runner.max_model_len)
        worst = 0.0
        for planned, runner in zip(plan.ranks, runners, strict=True):
            found = runner.device_bytes()
            pairs = {
                "vision": planned.vision_bytes,
                "decoder": planned.decoder_bytes,
                "embedding": planned.embedding_bytes,
                "kv_cache": planned.kv_bytes_per_token * runner.num_blocks * runner.block_size,
            }
            for kind, number in pairs.items():
                worst = max(worst, abs(found[kind] - number) / found[kind])
            others = planned.activation_bytes + planned.feature_bytes + planned.graph_bytes
            assert planned.total_bytes == sum(list(pairs.values())[:3]) + others
        print(f"\n{decoder} tp {tp}: planned and measured differ by {100 * worst:.3f} % at most")
        assert worst < 0.02
        lines = memory_lines(
            EngineConfig(model=str(folder), tp=tp), config, {rank: ready(runner, rank) for rank, runner in enumerate(runners)}
        )
    assert (
        len(lines) == tp + 1
        and lines[0].startswith("rank 0 on cpu holds in MiB")
        and lines[-1].startswith("the ranks differ by 0.")
    )


def ready(runner: Runner, rank: int) -> Ready:
    return Ready(
        rank=rank,
        max_model_len=runner.max_model_len,
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        vocab_size=1,
        device="cpu",
        dtype="float32",
        device_bytes=runner.device_bytes(),
    )
