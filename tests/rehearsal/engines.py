"""What the rehearsal's tests share: small engines, their answers, and where they waited for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoints
from tests.engine.reference import Ties, add, engine, run
from tests.rehearsal.cuda import Rehearsal
from tests.rehearsal.launches import Launches
from vlserve.config import SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.messages import TokenEvent
from vlserve.prompt.build import Prompt

SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128, "kv_cache_gib": 0.001}
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<IMG_CONTEXT>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
READ = "Event.synchronize at vlserve/kernels/upload.py"
RECORDED = "torch.cuda.synchronize at vlserve/engine/cuda_graphs.py"  # once for each graph, in its first step

Answers = dict[int, list[TokenEvent]]
Asked = tuple[Prompt, SamplingParams, int]


@dataclass(frozen=True, slots=True)
class Rig:
    """A card, and what was launched on it."""

    card: Rehearsal
    launches: Launches

    def engine(self, folder: Path, **options: Any) -> Engine:
        return engine(folder, **{"device": "cuda", **SMALL, **options})

    def serve(self, ours: Engine, asked: list[Asked], then: Callable[[], object] = lambda: None) -> Answers:
        """What an engine answers, which must wait once for each step that samples, and once for each graph that it records; and
        must launch nothing that it has not launched before. `then`: done between the third step and the fourth."""
        known, recorded, reads = set(self.launches.signatures), num_recorded(ours), 0
        finish = ours.runner.finish

        def counted(step: Any) -> Any:
            nonlocal reads
            reads += step.drawn is not None
            return finish(step)

        self.card.shared.waits.clear()
        ours.runner.finish = counted  # type: ignore[method-assign]
        try:
            got = serve(ours, asked, then)
        finally:
            ours.runner.finish = finish  # type: ignore[method-assign]
        assert waits(self.card) == Counter({READ: reads, RECORDED: num_recorded(ours) - recorded})
        new = set(self.launches.signatures) - known
        assert not new, "compiled within a request: " + "\n".join(map(str, new))
        return got


def make_tiny(folder: Path, decoder: str = "qwen2", **settings: Any) -> Path:
    """A checkpoint that the interpreter is soon through with: a tile has four patches and one feature, and what is asked stands
    alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "TILE", 14)
        patch.setattr(checkpoints, "CHAT_TEMPLATE", TEMPLATE)
        return checkpoints.make_checkpoint(folder, decoder, **TINY | settings)


def num_recorded(ours: Engine) -> int:
    """Graphs of an engine."""
    kinds = ours.runner.decodes, ours.runner.encoder and ours.runner.encoder.graphs
    return sum(len(one.graphs.recorded) for one in kinds if one)


def serve(ours: Engine, asked: list[Asked], then: Callable[[], object] = lambda: None) -> Answers:
    for i, each in enumerate(asked):
        add(ours, i, *each)
    early = [event for _ in range(3) for event in ours.step()]
    then()
    events: Answers = {}
    for event in early:
        events.setdefault(event.id, []).append(event)
    for id, rest in run(ours).items() if ours.has_work else ():
        events.setdefault(id, []).extend(rest)
    return events


def same(got: Answers, want: Answers) -> None:
    ties = Ties()
    assert got.keys() == want.keys()
    for id in want:
        ties.same(got[id], want[id])
        assert [one.finish_reason for one in got[id]] == [one.finish_reason for one in want[id]]
    ties.check()
    assert ties.largest_logprob_difference < 1e-3


def answers(ours: Engine, prompts: list[Prompt], max_tokens: int = 4) -> tuple[Answers, int]:
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


def tokens(got: Answers) -> dict[int, list[int | None]]:
    return {i: [event.token_id for event in events] for i, events in got.items()}


def waits(card: Rehearsal) -> Counter[str]:
    """How often the host waited for the device, as `operator at file`."""
    return Counter(place.rpartition(":")[0] for place in card.shared.waits)
