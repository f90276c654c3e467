"""A variation of the decoder comes in by a reader and a class, and equals transformers', on one rank and on two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.engine.ranks import tp_engine
from tests.engine.reference import Comparison, Transformers, add, engine, prompt, run
from tests.llm.granite import add_granite
from tests.vision.test_preprocess import noise
from vlserve.config import SamplingParams
from vlserve.engine.engine import Engine
from vlserve.errors import ConfigError
from vlserve.llm.config_readers import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.tensor_parallel import Split
from vlserve.models.checkpoint import read_checkpoint
from vlserve.plan.tp_plan import make_plan
from vlserve.quantize.source_checkpoint import Source

MULTIPLIERS: dict[str, Any] = {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.7}


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        add_granite(patch)
        yield checkpoint("granite", **MULTIPLIERS)


def test_granite_equals_transformers(folder: Path) -> None:
    reference = Transformers(folder)
    asked = [("What shape is it?", []), ("And these?", [Image.fromarray(noise(40, 30)), Image.fromarray(noise(64, 64))])]
    wanted = [reference.generate(text, images, 12) for text, images in asked]

    def compare(ours: Engine) -> None:
        comparison = Comparison()
        for id, (text, images) in enumerate(asked):
            add(ours, id, prompt(folder, text, images), SamplingParams(logprobs=5), 12)
        events = run(ours)
        for id, (_, ids, logits) in enumerate(wanted):
            comparison.take(events[id], ids, logits)
        comparison.check()
        assert comparison.largest_logprob_difference < 1e-3

    compare(engine(folder))
    with tp_engine(folder, 2) as (ours, _):
        compare(ours)


def test_what_is_not_ours_is_planned_and_not_quantised(folder: Path) -> None:
    assert make_plan(read_checkpoint(folder).config, tp=2).supported
    with pytest.raises(ConfigError, match="GraniteAttention, GraniteMLP, the decoder Granite, with which vlserve quantize"):
        Source(read_checkpoint(folder))


def test_a_kind_of_layer_that_a_decoder_lacks_is_named() -> None:
    text = {"model_type": "qwen2", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = read_decoder_config(text | {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 8})
    with pytest.raises(ValueError, match="layer_types has full_attention; this decoder has other"):
        Decoder(config, Split(), {"other": None})  # type: ignore[dict-item]
