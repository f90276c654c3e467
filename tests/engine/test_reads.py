"""A step brings its numbers to the device in one copy and waits for it once: to read the tokens that were sampled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.reference import add, engine, prompt
from vlserve.config import SamplingParams
from vlserve.engine import batch

READS = ("tolist", "item", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__")
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")  # operators that need a result


class Waits(TorchDispatchMode):
    """Operators that would wait for a device, with indexing by a mask."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype is torch.bool] if name in ("index", "index_put_") else []
        if name in WAITING or masks:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    counted: Counter[str] = Counter()

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        return counting

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, count(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(batch, "upload", count("upload", batch.upload))
    yield counted


SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.8, top_k=7, top_p=0.9, min_p=0.01, seed=1),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1, logit_bias={5: 1.5}),
    SamplingParams(logprobs=3, min_tokens=2),
]


@pytest.mark.parametrize("overlaps", (False, True))
def test_a_step_reads_once(checkpoint: Callable[..., Path], seen: Counter[str], overlaps: bool) -> None:
    from PIL import Image

    from tests.vision.test_preprocess import noise

    folder = checkpoint("qwen2")
    ours = engine(folder, max_num_batched_tokens=40)
    ours.overlaps = overlaps
    for i, sampling in enumerate(SAMPLING):
        pictures = [Image.fromarray(noise(30, 20, seed=2))] if i == 0 else []
        add(ours, i, prompt(folder, "What is it? " * (i + 1), pictures), sampling, 4)
    num_steps = num_unsampled = 0
    while ours.has_work:
        seen.clear()
        with Waits(seen):
            events = ours.step()
        assert dict(seen) == ({"upload": 1} if ours.has_work or not overlaps else {}) | ({"tolist": 1} if events else {}), seen
        num_steps, num_unsampled = num_steps + 1, num_unsampled + (not events)
    assert num_steps > 5 and num_unsampled
