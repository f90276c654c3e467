"""Qwen2.5-VL (`model_type: qwen2_5_vl`): as Qwen2-VL, with an encoder that sees windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlserve.models.architecture import Architecture, Config, EncoderBytes, Files
from vlserve.models.qwen2_vl import PUBLISHED, decoder
from vlserve.models.qwen_vl import QwenPreprocessor, alone, encoder_bytes, make_model, make_preprocessor
from vlserve.vision.qwen_config import read_qwen2_5_vision

if TYPE_CHECKING:
    from vlserve.llm.tensor_parallel import Split
    from vlserve.models.base import Model


def preprocessor(config: Config, files: Files) -> QwenPreprocessor:
    return make_preprocessor(config, files, read_qwen2_5_vision(config), PUBLISHED)


def build(config: Config, preprocessor: QwenPreprocessor, split: Split) -> Model:
    from vlserve.vision.qwen2_5_vl import Qwen2_5VLTower

    vision = read_qwen2_5_vision(config)
    return make_model(decoder(config), split, Qwen2_5VLTower(vision, preprocessor.image), vision.out_size)


def sizes(config: Config, preprocessor: QwenPreprocessor, itemsize: int) -> EncoderBytes:
    return encoder_bytes(read_qwen2_5_vision(config), preprocessor, itemsize)


QWEN2_5_VL = Architecture(preprocessor=preprocessor, build=build, decoder=decoder, sizes=sizes, language_model=alone(decoder))
