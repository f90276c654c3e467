"""Qwen2-VL (`model_type: qwen2_vl`): pictures of any size, rotary positions of three parts, and a Qwen2 decoder."""

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
from vlserve.vision.qwen_config import read_qwen2_vision

if TYPE_CHECKING:
    from vlserve.llm.tensor_parallel import Split
    from vlserve.models.base import Model

PUBLISHED = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}
# Qwen2VLTextConfig's own settings, and Qwen2_5_VLTextConfig's, where a config.json has none
TEXT: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "sliding_window": 4096,
    "rope_theta": 1e6,
}
SECTIONS = (16, 24, 24)


def preprocessor(config: Config, files: Files) -> QwenPreprocessor:
    return make_preprocessor(config, files, read_qwen2_vision(config), PUBLISHED)


def decoder(config: Config) -> DecoderConfig:
    """Frequencies turn by time, then by row, then by column."""
    found, rope = read_qwen_text(config, "qwen2", TEXT)
    sections = read_sections(rope, SECTIONS, found, interleaved=False)
    return replace(found, mrope_axes=tuple(axis for axis, number in enumerate(sections) for _ in range(number)))


def build(config: Config, preprocessor: QwenPreprocessor, split: Split) -> Model:
    from vlserve.vision.qwen2_vl import Qwen2VLTower

    vision = read_qwen2_vision(config)
    return make_model(decoder(config), split, Qwen2VLTower(vision, preprocessor.image), vision.out_size)


def sizes(config: Config, preprocessor: QwenPreprocessor, itemsize: int) -> EncoderBytes:
    return encoder_bytes(read_qwen2_vision(config), preprocessor, itemsize)


QWEN2_VL = Architecture(preprocessor=preprocessor, build=build, decoder=decoder, sizes=sizes, language_model=alone(decoder))
