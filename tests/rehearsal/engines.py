"""What the rehearsal's tests share: small engines, their answers, and where they waited for the device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine.reference import add, engine, run
from tests.rehearsal.cuda import Rehearsal
from tests.rehearsal.launches import Launches
from vlserve.config import SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.messages import TokenEvent
from vlserve.prompt.build import Prompt

SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128, "kv_cache_gib": 0.001}
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
READ = "Event.synchronize at vlserve/kernels/upload.py"
RECORDED = "torch.cuda.synchronize at vlserve/engine/cuda_graphs.py"  # once for each graph


@dataclass(frozen=True, slots=True)
class Rig:
    """A card, and what was launched on it."""

    card: Rehearsal
    launches: Launches

    def engine(self, folder: Path, **options: Any) -> Engine:
        return engine(folder, **{"device": "cuda", **SMALL, **options})


def answers(ours: Engine, prompts: list[Prompt], max_tokens: int = 4) -> tuple[dict[int, list[TokenEvent]], int]:
    """And the number of steps."""
    for i, one in enumerate(prompts):
        add(ours, i, one, SamplingParams(logprobs=2), max_tokens)
    before, steps = ours.step, 0

    def counted() -> list[TokenEvent]:
        nonlocal steps
        steps += 1
        return before()

    ours.step = counted  # type: ignore[method-assign]
    try:
        return run(ours), steps
    finally:
        ours.step = before  # type: ignore[method-assign]


def tokens(got: dict[int, list[TokenEvent]]) -> dict[int, list[int | None]]:
    return {i: [event.token_id for event in events] for i, events in got.items()}


def waits(card: Rehearsal) -> Counter[str]:
    """How often the host waited for the device, as `operator at file`."""
    return Counter(place.rpartition(":")[0] for place in card.shared.waits)
