"""Random checkpoints of the published shapes, shrunk in depth and width: heads, key-value heads and experts in the same ratios.

Each answers alike at every degree up to 4 that it allows, and refuses the others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.engine.ranks import tp_engine
from tests.engine.reference import engine, run, tokens
from tests.published import PUBLISHED, Config, Published
from vlserve.config import SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.messages import Add, MediaRef
from vlserve.errors import ConfigError
from vlserve.llm.tensor_parallel import Split
from vlserve.llm.weights import slot_of
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.registry import find_architecture
from vlserve.plan.tp_plan import check_tp

SMALL: Config = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 32, "vision_cache_gib": 0.0}
VOCAB, PLACEHOLDER = 61, 60
TEXTS = ("Qwen/Qwen2-7B", "Qwen/QwQ-32B", "Qwen/Qwen2.5-72B-Instruct-AWQ")  # whose decoders are in models with pictures too
IMAGE, PATCH = 28, 14
FEATURES = (IMAGE // PATCH // 2) ** 2  # of a tile


def shape_of(model: Published) -> tuple[Any, ...]:
    """Models that are alike in it have decoders that shrink to the same; quantised ones are tried dense."""
    names = ("num_attention_heads", "num_key_value_heads", "num_experts", "partial_rotary_factor")
    return model.name in TEXTS, model.decoder, *(model.llm.get(name) for name in names)


SHAPES = list({shape_of(model): model for model in reversed(PUBLISHED.values())}.values())


def shrunk(config: Config) -> Config:
    """In width, depth and vocabulary."""
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "image_seq_length")}
    if "vision_config" not in config:
        return _shrunk_llm(config) | {"torch_dtype": "float32"}
    section = "llm_config" if "llm_config" in config else "text_config"
    vision, side = config["vision_config"], [IMAGE, IMAGE] if section == "text_config" else IMAGE
    heads = vision["num_attention_heads"]
    small = {"hidden_size": 4 * heads, "intermediate_size": 16 * heads, "num_hidden_layers": 1, "image_size": side}
    more = {"force_image_size": IMAGE} if section == "llm_config" else {"image_token_id": PLACEHOLDER}
    return config | more | {section: _shrunk_llm(config[section]), "vision_config": vision | small, "torch_dtype": "float32"}


def _shrunk_llm(llm: Config) -> Config:
    heads, width = llm["num_attention_heads"], llm["hidden_size"]
    old = llm.get("head_dim") or width // heads
    dim = 8 if "partial_rotary_factor" in llm else 4
    hidden = width * dim // old
    small = {"hidden_size": hidden, "num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 64}
    small |= {key: llm[key] * hidden // width for key in ("intermediate_size", "moe_intermediate_size") if key in llm}
    if "head_dim" in llm:
        small["head_dim"] = dim
    if "num_experts" in llm:
        small |= {"num_experts": llm["num_experts"] // 4, "num_experts_per_tok": llm["num_experts_per_tok"] // 4}
    if "layer_types" in llm:
        small["layer_types"] = llm["layer_types"][:2]
    if "short_factor" in (llm.get("rope_scaling") or {}):
        number = int(dim * llm.get("partial_rotary_factor", 1)) // 2
        rope = llm["rope_scaling"]
        small["rope_scaling"] = rope | {key: rope[key][:number] for key in ("short_factor", "long_factor")}
    if llm.get("sliding_window"):
        small["sliding_window"] = 5
    return {key: value for key, value in llm.items() if key != "quantization_config"} | small


def write(folder: Path, config: Config) -> Path:
    """With random weights, under the names that all decoders have in common."""
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": PLACEHOLDER}))
    architecture, numbers = find_architecture(config), torch.Generator().manual_seed(1)
    with torch.device("meta"):
        model = architecture.build(config, architecture.preprocessor(config, {}), Split())
    shapes = {name: slot_of(target).full for name, target in model.targets().items()}
    stored = {
        name: torch.randn(shape, generator=numbers) * (0.4 if len(shape) == 1 else shape[-1] ** -0.5) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def answer(ours: Engine, folder: Path) -> list[int]:
    """To a text, behind a picture where the model sees."""
    ids, media, pixels = [5, 9, 17, 3, 44, 21, 8, 30, 2, 40], [], []
    if ours.runner.model.tower is not None:
        noise = np.random.default_rng(0).integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8)
        picture = read_checkpoint(folder).preprocessor.prepare(Image.fromarray(noise), "auto")
        media = [MediaRef(digest=picture.digest, units=list(picture.units), runs=[(2, FEATURES)], start=2)]
        ids, pixels = ids[:2] + [PLACEHOLDER] * FEATURES + ids[2:], [torch.from_numpy(picture.data)]
    sampling = SamplingParams(ignore_eos=True)
    ours.add(Add(id=0, token_ids=ids, media=media, sampling=sampling, max_tokens=6), pixels)
    return tokens(run(ours)[0])


@pytest.mark.parametrize("model", SHAPES, ids=lambda model: model.name)
def test_a_published_shape_answers_at_every_legal_degree(model: Published, tmp_path: Path) -> None:
    folder = write(tmp_path, shrunk(model.config))
    config = json.loads((folder / "config.json").read_text())
    wanted = answer(engine(folder, **SMALL), folder)
    legal = []
    for tp in range(2, 5):
        try:
            check_tp(model.config, tp, replicate_kv_heads=True)
        except ConfigError as error:
            assert "is not divisible by" in str(error)
            with pytest.raises(ConfigError, match=f"is not divisible by {tp}"):
                engine(folder, tp=tp, replicate_kv_heads=True, **SMALL)
            continue
        legal.append(tp)
        with tp_engine(folder, tp, replicate_kv_heads=True, **SMALL) as (ours, _):
            assert answer(ours, folder) == wanted, tp
    heads, kv_heads = (shrunk(model.llm)[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    assert (heads, kv_heads) == tuple(model.llm[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    assert {tp for tp in model.degrees if 1 < tp <= 4} <= set(legal) and config["torch_dtype"] == "float32"
