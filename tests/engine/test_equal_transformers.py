"""Greedy tokens in float32 equal transformers' generate, for every kind of decoder and several pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.engine.reference import Comparison, Transformers, add, engine, prompt, run
from tests.vision.test_preprocess import noise
from vlserve.config import SamplingParams

PICTURES = [(40, 30), (200, 50), (31, 90), (64, 64)]  # unequal aspect ratios
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "max_shard": "100KB"}),
    ("qwen3", {}),
    ("llama", {}),
    (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    ("mistral", {}),
    ("mistral", {"sliding_window": 9}),
    ("phi3", {}),
    ("phi3", {"sliding_window": 7}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("qwen2", {"vision_qk_norm": True, "norm_type": "rms_norm"}),
]


@pytest.mark.parametrize("decoder,settings", KINDS, ids=str)
def test_greedy_tokens_equal_transformers(decoder: str, settings: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(decoder, **settings)
    if settings.get("max_shard"):
        assert len(list(folder.glob("*.safetensors"))) > 1
    reference, ours, comparison = Transformers(folder), engine(folder), Comparison()
    sampling = SamplingParams(logprobs=5)
    wanted = {}
    for number in (0, 1, 2, 4):
        for question in ("What shape is it?", "Describe the picture, please: é 漢字 🙂"):
            images = [Image.fromarray(noise(*size, seed=number)) for size in PICTURES[:number]]
            id = len(wanted)
            p = prompt(folder, question, images)
            wanted[id] = reference.generate(question, images, 16)
            assert p.token_ids == wanted[id][0], "prompt tokens"
            add(ours, id, p, sampling, 16)
    for id, events in run(ours).items():
        comparison.take(events, *wanted[id][1:])
    print(f"{decoder} {settings}: {comparison}")
    comparison.check()
    assert comparison.largest_logprob_difference < 1e-3
