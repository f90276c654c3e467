"""Settings of the vision side, frozen: the encoder's shape and how pictures are cut.

Read from a checkpoint's JSON; raises ValueError with the offending key. No torch here: the front
process reads it before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlserve.vision.pixels import Unit

TILES_AT_ONCE = 16  # in one run of the encoder, which bounds its peak memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """How a picture becomes tiles; part of the digest, since each field changes the pixels."""

    tile_size: int  # pixels
    tokens_per_tile: int
    min_patches: int = 1
    max_patches: int = 12
    dynamic: bool = True
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def unit(self) -> Unit:
        """What a tile is to the encoder."""
        return Unit((3, self.tile_size, self.tile_size), self.tokens_per_tile)


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

    @property
    def tokens_per_tile(self) -> int:
        return int(self.image_size // self.patch_size * self.downsample_ratio) ** 2


def read_encoder_config(config: Mapping[str, Any]) -> EncoderConfig:
    """Read `vision_config` of a whole InternVL config."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise ValueError("config.json has no vision_config")
    fixed = {"hidden_act": "gelu", "use_absolute_position_embeddings": True, "use_mask_token": False, "num_channels": 3}
    for key, value in fixed.items():
        if vision.get(key, value) != value:
            raise ValueError(f"vision_config.{key} {vision[key]!r} is not supported; supported: {value!r}")
    outer = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    for key, value in outer.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} {config[key]!r} is not supported; supported: {value!r}")
    if not vision.get("use_mean_pooling", True):
        raise ValueError("vision_config.use_mean_pooling false is not supported; supported: true")
    norm_type = vision.get("norm_type", "layer_norm")
    if norm_type not in ("layer_norm", "rms_norm"):
        raise ValueError(f"vision_config.norm_type {norm_type!r} is not supported; supported: layer_norm, rms_norm")
    image_size, patch_size = _square(vision, "image_size"), _square(vision, "patch_size")
    ratio = float(config.get("downsample_ratio", 0.5))
    if image_size % patch_size or (image_size // patch_size * ratio) % 1:
        raise ValueError(f"vision_config.image_size {image_size} gives no whole tokens of patch_size {patch_size} / {ratio}")
    return EncoderConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=int(vision["hidden_size"]),
        intermediate_size=int(vision["intermediate_size"]),
        num_hidden_layers=int(vision["num_hidden_layers"]),
        num_attention_heads=int(vision["num_attention_heads"]),
        attention_bias=bool(vision.get("attention_bias", False)),
        use_qk_norm=bool(vision.get("use_qk_norm", False)),
        norm_type=norm_type,
        layer_norm_eps=float(vision.get("layer_norm_eps", 1e-6)),
        downsample_ratio=ratio,
    )


def read_image_config(preprocessor: Mapping[str, Any], encoder: EncoderConfig) -> ImageConfig:
    """Read preprocessor_config.json (or the `image_processor` part of processor_config.json)."""
    tile_size = preprocessor.get("size", {}).get("height", encoder.image_size)
    if tile_size != encoder.image_size or preprocessor.get("size", {}).get("width", tile_size) != tile_size:
        raise ValueError(f"preprocessor size {preprocessor['size']} is not the encoder's image_size {encoder.image_size}")
    return ImageConfig(
        tile_size=tile_size,
        tokens_per_tile=encoder.tokens_per_tile,
        min_patches=int(preprocessor.get("min_patches", 1)),
        max_patches=int(preprocessor.get("max_patches", 12)),
        # InternVL's processor turns tiling on whatever its image processor's own default says
        dynamic=bool(preprocessor.get("crop_to_patches", True)),
        mean=tuple(preprocessor.get("image_mean", (0.485, 0.456, 0.406))),
        std=tuple(preprocessor.get("image_std", (0.229, 0.224, 0.225))),
    )


def _square(vision: Mapping[str, Any], key: str) -> int:
    value = vision[key]
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"vision_config.{key} {value} is not square")
    return int(sides.pop())
