"""The encoder's shape, frozen.

Read from a checkpoint's JSON; raises ValueError with the offending key. No torch here: the front
process reads it before torch is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# as transformers' InternVLVisionConfig and InternVLConfig
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
}
OUTER_DEFAULTS: Mapping[str, Any] = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "downsample_ratio": 0.5,
}
FIXED: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "use_absolute_position_embeddings": True,
    "use_mask_token": False,
    "use_mean_pooling": True,
    "num_channels": 3,
}
TILES_AT_ONCE = 16  # in one run of the encoder, which bounds its peak memory


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """InternViT and the projector behind it; field names are the checkpoint's."""

    image_size: int  # pixels
    patch_size: int  # pixels
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    attention_bias: bool
    use_qk_norm: bool
    norm_type: str  # layer_norm or rms_norm
    layer_norm_eps: float
    downsample_ratio: float
    transposed_tokens: bool = False  # of a tile, by columns: `ps_version` v1 of OpenGVLab's format

    @property
    def tokens_per_tile(self) -> int:
        return int(self.image_size // self.patch_size * self.downsample_ratio) ** 2


def read_encoder_config(config: Mapping[str, Any]) -> EncoderConfig:
    """Read `vision_config` of a whole InternVL config; keys that are missing or null are as in transformers."""
    stored = config.get("vision_config")
    if not isinstance(stored, Mapping):
        raise ValueError("config.json has no vision_config")
    vision = {**DEFAULTS, **without_nulls(stored)}
    for key, value in FIXED.items():
        if vision.get(key, value) != value:
            raise ValueError(f"vision_config.{key} {vision[key]!r} is not supported; supported: {value!r}")
    outer = {**OUTER_DEFAULTS, **without_nulls(config)}
    for key, value in OUTER_DEFAULTS.items():
        if key != "downsample_ratio" and outer[key] != value:
            raise ValueError(f"{key} {outer[key]!r} is not supported; supported: {value!r}")
    if vision["norm_type"] not in ("layer_norm", "rms_norm"):
        raise ValueError(f"vision_config.norm_type {vision['norm_type']!r} is not supported; supported: layer_norm, rms_norm")
    image_size, patch_size = _square(vision, "image_size"), _square(vision, "patch_size")
    ratio = _number(outer, "downsample_ratio", "")
    if image_size % patch_size or (image_size // patch_size * ratio) % 1:
        raise ValueError(f"vision_config.image_size {image_size} gives no whole tokens of patch_size {patch_size} / {ratio}")
    hidden, heads = _integer(vision, "hidden_size"), _integer(vision, "num_attention_heads")
    if hidden % heads:
        raise ValueError(f"vision_config.hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    return EncoderConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden,
        intermediate_size=_integer(vision, "intermediate_size"),
        num_hidden_layers=_integer(vision, "num_hidden_layers"),
        num_attention_heads=heads,
        attention_bias=bool(vision.get("attention_bias", False)),
        use_qk_norm=bool(vision.get("use_qk_norm", False)),
        norm_type=vision["norm_type"],
        layer_norm_eps=_number(vision, "layer_norm_eps"),
        downsample_ratio=ratio,
    )


def without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _square(vision: Mapping[str, Any], key: str) -> int:
    value = vision[key]
    sides = value if isinstance(value, (list, tuple)) else [value]
    if len(sides) not in (1, 2) or any(side != sides[0] for side in sides):
        raise ValueError(f"vision_config.{key} {value} is not square")
    return _integer({key: sides[0]}, key)


def _integer(vision: Mapping[str, Any], key: str) -> int:
    value = vision[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"vision_config.{key} is {value!r}; expected a positive integer")
    return value


def _number(given: Mapping[str, Any], key: str, where: str = "vision_config.") -> float:
    value = given[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{where}{key} is {value!r}; expected a number above 0")
    return float(value)
