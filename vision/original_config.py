"""The encoder's shape and the tiling as OpenGVLab's own config.json has them (`model_type: internvl_chat`). No torch is needed.

Source: configuration_intern_vit.py and configuration_internvl_chat.py of github.com/OpenGVLab/InternVL, whose defaults are these.
Raises ValueError with the offending key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlserve.vision.config import EncoderConfig, read_encoder_config, without_nulls
from vlserve.vision.image_config import IMAGENET_MEAN, IMAGENET_STD, MAX_PATCHES, ImageConfig

_VISION: Mapping[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": False,
    "qk_normalization": True,
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "use_moe": False,
}
_OUTER: Mapping[str, Any] = {
    "downsample_ratio": 0.5,
    "select_layer": -1,
    "ps_version": "v1",
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "pad2square": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
QK_NORM_EPS = 1e-6  # of the norms over query and key


def read_original_encoder(config: Mapping[str, Any]) -> EncoderConfig:
    """`vision_config` with what stands beside it. Layers above `select_layer` are left out: nothing reads them."""
    stored = config.get("vision_config")
    if not isinstance(stored, Mapping):
        raise ValueError("config.json has no vision_config")
    vision, outer = {**_VISION, **without_nulls(stored)}, {**_OUTER, **without_nulls(config)}
    if vision["use_moe"]:
        raise ValueError(f"vision_config.use_moe {vision['use_moe']!r} is not supported; supported: False")
    if outer["ps_version"] not in ("v1", "v2"):
        raise ValueError(f"ps_version {outer['ps_version']!r} is not supported; supported: v1, v2")
    names = {"attention_bias": vision["qkv_bias"], "use_qk_norm": vision["qk_normalization"]}  # transformers' for the same
    encoder = read_encoder_config({"vision_config": vision | names, "downsample_ratio": outer["downsample_ratio"]})
    if outer.get("force_image_size", encoder.image_size) != encoder.image_size:
        forced = outer["force_image_size"]
        raise ValueError(f"force_image_size {forced!r} is not supported beside vision_config.image_size {encoder.image_size}")
    eps = encoder.layer_norm_eps
    if encoder.use_qk_norm and eps != QK_NORM_EPS:
        raise ValueError(f"vision_config.layer_norm_eps {eps} is not supported with qk_normalization; supported: {QK_NORM_EPS}")
    depth = _depth(encoder.num_hidden_layers, outer["select_layer"])
    return replace(encoder, num_hidden_layers=depth, transposed_tokens=outer["ps_version"] == "v1")


def read_original_image_config(config: Mapping[str, Any], settings: Mapping[str, Any], encoder: EncoderConfig) -> ImageConfig:
    """Tiling as config.json has it, on Pillow's bicubic; the published code knows ImageNet's mean and deviation only.

    Args:
        settings: preprocessor_config.json, of which that code reads nothing; what contradicts it is refused.
    """
    outer = {**_OUTER, **without_nulls(config)}
    for key, expected in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        if settings.get(key) is not None and list(settings[key]) != list(expected):
            raise ValueError(f"{key} {settings[key]!r} is not supported by models in OpenGVLab's format; supported: {expected}")
    low, high = (_count(outer, key) for key in ("min_dynamic_patch", "max_dynamic_patch"))
    if low > high:
        raise ValueError(f"min_dynamic_patch {low} is more than max_dynamic_patch {high}")
    return ImageConfig(
        tile_size=encoder.image_size,
        tokens_per_tile=encoder.tokens_per_tile,
        min_patches=low,
        max_patches=high,
        dynamic=_truth(outer, "dynamic_image_size"),
        thumbnail=_truth(outer, "use_thumbnail"),
        pad_to_square=_truth(outer, "pad2square"),
        resize="pillow",
    )


def _depth(layers: int, select_layer: Any) -> int:
    """Layers up to the one whose output is read; 0 would be the embeddings, -1 is the last one's."""
    if isinstance(select_layer, bool) or not isinstance(select_layer, int) or not 1 <= abs(select_layer) <= layers:
        raise ValueError(f"select_layer is {select_layer!r}; expected 1 to {layers}, or from the end -1 to {-layers}")
    return select_layer if select_layer > 0 else layers + 1 + select_layer


def _truth(outer: Mapping[str, Any], key: str) -> bool:
    if not isinstance(outer[key], bool):
        raise ValueError(f"{key} is {outer[key]!r}; expected true or false")
    return bool(outer[key])


def _count(outer: Mapping[str, Any], key: str) -> int:
    value = outer[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_PATCHES:
        raise ValueError(f"{key} is {value!r}; expected a whole number of 1 to {MAX_PATCHES}")
    return value
