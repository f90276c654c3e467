"""Every family of models on a card that is not there: its tokens are the CPU's, by launches, chunks and replayed graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engine.reference import engine, prompt
from tests.engine.test_laws import picture
from tests.families import FAMILIES, OF_LLAMA, QWEN_VL
from tests.llm.granite import add_granite
from tests.models import toy_family
from tests.models.toy_family import TOY, make_toy
from tests.original_format import make_original, make_text
from tests.rehearsal.engines import SMALL, TEMPLATE, Rig, answers, make_tiny, tokens
from vlserve.config import SamplingParams
from vlserve.engine.engine import Engine
from vlserve.llm import config_readers
from vlserve.models import registry

OPTIONS: dict[str, Any] = SMALL | {"max_num_batched_tokens": 8, "max_model_len": 64, "block_size": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 5e5}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
SHAPES: list[
    dict[str, Any]
] = [  # of heads, with kinds of rope scaling, groups, and sizes that divide by nothing: a family has one
    {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3},
    {"head_dim": 64, "rope_parameters": LLAMA3, "num_key_value_heads": 4},
    {"head_dim": 96, "rope_parameters": YARN, "num_key_value_heads": 1, "intermediate_size": 65, "vocab_size": 341},
    {"head_dim": 128, "rope_parameters": DYNAMIC},
]
CASES = [(decoder, shape | settings) for (decoder, settings), shape in zip(FAMILIES, itertools.cycle(SHAPES), strict=False)]


def make(folder: Path, decoder: str, settings: dict[str, Any]) -> Path:
    """Of as few layers as have all of its kinds."""
    number = 2 if decoder == "gpt_oss" else 1 + settings.get("max_window_layers", 0)
    return make_tiny(folder, decoder, **settings | {"num_hidden_layers": number})


def same(rig: Rig, folder: Path, *images: Image.Image) -> Engine:
    asked = [prompt(folder, "which of 5, 7?", list(images))]
    want, _ = answers(engine(folder, device="cpu", **OPTIONS), asked, 3)
    ours = rig.engine(folder, **OPTIONS)
    got, _ = answers(ours, asked, 3)
    assert tokens(got) == tokens(want)
    return ours


@pytest.mark.parametrize("decoder,settings", CASES, ids=str)
def test_a_family_answers_as_on_the_cpu(decoder: str, settings: dict[str, Any], rig: Rig, tmp_path: Path) -> None:
    ours = same(rig, make(tmp_path, decoder, settings), picture(1, (14, 14)))
    assert ours.runner.decodes is not None and ours.runner.decodes.graphs.recorded


@pytest.mark.parametrize("family", ("qwen2_5_vl", "qwen3_vl"))  # with windows, and with levels of features
def test_pictures_of_any_size_are_encoded_without_waiting(family: str, rig: Rig, tmp_path: Path) -> None:
    folder = make(tmp_path, family, {})
    ours = rig.engine(folder, **OPTIONS)
    sizes = ((14, 14), (90, 40), (40, 90))
    asked = [(prompt(folder, "which?", [picture(number, size)]), SamplingParams(), 2) for number, size in enumerate(sizes)]
    got = rig.serve(ours, asked)
    assert [len(events) for events in got.values()] == [2, 2, 2]


@pytest.mark.parametrize("decoder", ("qwen2", *OF_LLAMA))
def test_opengvlabs_format(decoder: str, rig: Rig, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "llama" if decoder in OF_LLAMA else decoder, {})
    folder = make_original(source, tmp_path / "original", decoder=decoder if decoder in OF_LLAMA else None)
    (folder / "chat_template.jinja").write_text(TEMPLATE)  # which is short
    same(rig, folder, picture(1, (14, 14)))


def test_a_decoder_alone(rig: Rig, tmp_path: Path) -> None:
    folder = make_text(make(tmp_path / "source", "qwen2", {}), tmp_path / "text")
    assert same(rig, folder).runner.model.tower is None


def test_every_family_is_rehearsed() -> None:
    decoders = {decoder for decoder, _ in FAMILIES} | set(OF_LLAMA)
    assert decoders == {*config_readers.READERS, *QWEN_VL}, "those of tests/families.py are those served"
    assert {"internvl", "internvl_chat", *decoders} == registry.BUILT_IN.keys()


def test_a_decoder_with_a_class_of_its_own(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_granite(monkeypatch)
    multipliers = {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.7}
    same(rig, make(tmp_path, "granite", multipliers), picture(1, (14, 14)))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Image.Image]:
    monkeypatch.setitem(registry.BUILT_IN, "toy", TOY)
    monkeypatch.setattr(toy_family, "TEMPLATE", TEMPLATE.replace("<IMG_CONTEXT>", toy_family.PICTURE))
    noise = np.random.default_rng(0)
    yield Image.fromarray(noise.integers(0, 256, (7, 9, 3), dtype=np.uint8))


@pytest.mark.parametrize("layer", ["sliding_attention", "sliding_experts", "running_mean"])
def test_a_family_of_the_seam(layer: str, toy: Image.Image, rig: Rig, tmp_path: Path) -> None:
    """Units of any size, positions of three parts, levels of features; experts that the host chooses, which no graph can hold;
    and a layer that says so of itself."""
    ours = same(rig, make_toy(tmp_path, [layer]), toy)
    recorded = ours.runner.decodes.graphs.recorded if ours.runner.decodes is not None else ()
    assert bool(recorded) == (layer == "sliding_attention")
