"""Qwen3-VL (`model_type: qwen3_vl`): features of several levels, which enter the first decoder layers, and a Qwen3 decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vlserve.llm.config import DecoderConfig
from vlserve.models.architecture import Architecture, Config, EncoderBytes, Files
from vlserve.models.qwen_vl import (
    QwenPreprocessor,
    alone,
    encoder_bytes,
    make_model,
    make_preprocessor,
    read_qwen_text,
    read_sections,
)
from vlserve.vision.qwen_config import read_qwen3_vision

if TYPE_CHECKING:
    from vlserve.llm.tensor_parallel import Split
    from vlserve.models.base import Model

PUBLISHED = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Qwen3VLTextConfig's own settings, where a config.json has none
TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
}
SECTIONS = (24, 20, 20)


def preprocessor(config: Config, files: Files) -> QwenPreprocessor:
    return make_preprocessor(config, files, read_qwen3_vision(config), PUBLISHED)


def text_decoder(config: Config) -> DecoderConfig:
    """Frequencies turn by time, row and column in turns; where a section is through, the rest turns by time."""
    found, rope = read_qwen_text(config, "qwen3", TEXT)
    axes = [0] * (found.head_dim // 2)
    for axis, number in tuple(enumerate(read_sections(rope, SECTIONS, found, interleaved=True)))[1:]:
        for place in range(axis, min(3 * number, len(axes)), 3):
            axes[place] = axis
    return replace(found, mrope_axes=tuple(axes))


def decoder(config: Config) -> DecoderConfig:
    """With the layers that take features of their own."""
    found = text_decoder(config)
    levels = len(read_qwen3_vision(config).deep_layers)
    if levels > found.num_hidden_layers:
        raise ValueError(f"vision_config.deepstack_visual_indexes has {levels}, and the decoder {found.num_hidden_layers} layers")
    return replace(found, deep_layers=tuple(range(levels)))


def build(config: Config, preprocessor: QwenPreprocessor, split: Split) -> Model:
    from vlserve.vision.qwen3_vl import Qwen3VLTower

    vision = read_qwen3_vision(config)
    return make_model(decoder(config), split, Qwen3VLTower(vision, preprocessor.image), vision.out_size)


def sizes(config: Config, preprocessor: QwenPreprocessor, itemsize: int) -> EncoderBytes:
    return encoder_bytes(read_qwen3_vision(config), preprocessor, itemsize)


QWEN3_VL = Architecture(preprocessor=preprocessor, build=build, decoder=decoder, sizes=sizes, language_model=alone(text_decoder))
