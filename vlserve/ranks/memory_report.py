"""What each rank holds beside what the plan said, for start-up's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlserve.config import EngineConfig
from vlserve.engine.messages import Ready
from vlserve.plan.tp_plan import make_plan

MIB = 2**20


def memory_lines(config: EngineConfig, model_config: Mapping[str, Any], ready: Mapping[int, Ready]) -> list[str]:
    """A line for each rank: MiB measured, and planned in brackets; then by how much the ranks differ."""
    lines, totals = [], []
    for rank, found in sorted(ready.items()):
        plan = make_plan(
            model_config,
            tp=config.tp,
            dtype=found.dtype,
            lm_head_bits=config.lm_head_bits,
            kv_cache_dtype=config.kv_cache_dtype,
            max_model_len=found.max_model_len,
            replicate_kv_heads=config.replicate_kv_heads,
        ).ranks[rank]
        planned = {
            "vision": plan.vision_bytes,
            "decoder": plan.decoder_bytes,
            "embedding": plan.embedding_bytes,
            "kv_cache": plan.kv_bytes_per_token * found.num_blocks * found.block_size,
        }
        totals.append(sum(found.device_bytes[kind] for kind in planned))
        parts = [f"{kind} {found.device_bytes[kind] / MIB:.1f} ({planned[kind] / MIB:.1f})" for kind in planned]
        total = f"total {totals[-1] / MIB:.1f} ({sum(planned.values()) / MIB:.1f})"
        lines.append(f"rank {rank} on {found.device} holds in MiB, planned in brackets: {', '.join([*parts, total])}")
    if len(totals) > 1:
        lines.append(f"the ranks differ by {100 * (max(totals) - min(totals)) / max(totals):.2f} %")
    return lines
