"""The shape of Qwen-VL's vision encoders, read from `vision_config`. No torch is needed.

Raises ValueError with the offending key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlserve.vision.config import without_nulls


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenVisionConfig:
    """Field names are the checkpoint's where the three families agree on them."""

    depth: int
    width: int  # of a patch
    intermediate_size: int
    num_heads: int
    out_size: int  # of a feature: the decoder's hidden size
    patch_size: int  # pixels
    spatial_merge_size: int  # patches along the side of a feature
    temporal_patch_size: int  # frames
    rope_theta: float = 10000.0
    window: int = 0  # features along the side of a window; 0: every layer sees all of a picture
    full_layers: tuple[int, ...] = ()  # those that do, where there are windows
    position_side: int = 0  # of the square of learned positions; 0: there are none
    deep_layers: tuple[int, ...] = ()  # after which features for deeper decoder layers are taken

    @property
    def num_parameters(self) -> int:
        """Of the encoder with its mergers; windows come with RMSNorm and SwiGLU."""
        width, inner, merged = self.width, self.intermediate_size, self.width * self.spatial_merge_size**2
        norm = width if self.window else 2 * width
        mlp = 3 * width * inner + 2 * inner + width if self.window else 2 * width * inner + inner + width
        block = 2 * norm + 4 * width * (width + 1) + mlp
        positions = self.position_side**2 * width + width * bool(self.position_side)  # and the bias of the patches' embedding
        merger = merged * (merged + 1) + (merged + 1) * self.out_size
        patch = 3 * self.temporal_patch_size * self.patch_size**2 * width
        deep = len(self.deep_layers) * (2 * merged + merger)
        return patch + positions + self.depth * block + norm + merger + deep

    def peak_bytes(self, num_features: int, itemsize: int) -> int:
        """Of units with so many features in one call of `encode` on CUDA, at its fullest: vision/native_tower.py."""
        b, width, pixels = itemsize, self.width, 3 * self.patch_size**2
        normalise = max(9 * pixels, (1 + self.temporal_patch_size) * b * pixels)  # uint8, and two steps in float32; patches
        embed = self.temporal_patch_size * b * pixels + width * b
        # the block's input, the norm of it, query, key and value, one of them turned in float32, and in the encoder's type
        attention = width * (7 * b + 8)
        # the block's input, the sum so far and the norm of it; the feed-forward twice
        feed_forward = (3 * width + 2 * self.intermediate_size) * b
        kept = 4 * width // self.num_heads + 16 * bool(self.position_side)  # cos and sin; rows and columns
        merge = self.spatial_merge_size**2
        patches = merge * max(normalise, embed, kept + max(attention, feed_forward))
        order = 8 * bool(self.window)
        return num_features * (patches + order + len(self.deep_layers) * self.out_size * b)


def read_qwen2_vision(config: Mapping[str, Any]) -> QwenVisionConfig:
    """Qwen2-VL: `hidden_size` is the decoder's."""
    vision = _vision(
        config,
        {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16, "patch_size": 14},
        "quick_gelu",
    )
    width, ratio = _integer(vision, "embed_dim"), vision["mlp_ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or ratio <= 0:
        raise ValueError(f"vision_config.mlp_ratio is {ratio!r}; expected a number above 0")
    return _read(vision, width=width, intermediate_size=int(width * ratio), out_size=_integer(vision, "hidden_size"))


def read_qwen2_5_vision(config: Mapping[str, Any]) -> QwenVisionConfig:
    """Qwen2.5-VL: windows, but for `fullatt_block_indexes`."""
    vision = _vision(
        config,
        {
            "depth": 32,
            "hidden_size": 3584,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": (7, 15, 23, 31),
        },
        "silu",
    )
    size, patch, merge = (_integer(vision, key) for key in ("window_size", "patch_size", "spatial_merge_size"))
    if size < patch * merge:
        raise ValueError(f"vision_config.window_size is {size} pixels; a feature has {patch * merge}")
    return _read(
        vision,
        width=_integer(vision, "hidden_size"),
        intermediate_size=_integer(vision, "intermediate_size"),
        out_size=_integer(vision, "out_hidden_size"),
        window=size // merge // patch,
        full_layers=_layers(vision, "fullatt_block_indexes"),
    )


def read_qwen3_vision(config: Mapping[str, Any]) -> QwenVisionConfig:
    """Qwen3-VL: learned positions, and features of several levels."""
    vision = _vision(
        config,
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 3584,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": (8, 16, 24),
        },
        "gelu_pytorch_tanh",
    )
    positions = _integer(vision, "num_position_embeddings")
    side = int(positions**0.5)
    if side * side != positions:
        raise ValueError(f"vision_config.num_position_embeddings is {positions}; expected the square of a number")
    return _read(
        vision,
        width=_integer(vision, "hidden_size"),
        intermediate_size=_integer(vision, "intermediate_size"),
        out_size=_integer(vision, "out_hidden_size"),
        position_side=side,
        deep_layers=_layers(vision, "deepstack_visual_indexes"),
    )


def _vision(config: Mapping[str, Any], defaults: Mapping[str, Any], activation: str) -> dict[str, Any]:
    """`vision_config` with transformers' defaults for what is missing."""
    stored = config.get("vision_config")
    if not isinstance(stored, Mapping):
        raise ValueError(f"vision_config is {stored!r}; expected an object")
    always = {"spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_act": activation, "in_channels": 3, "in_chans": 3}
    vision = {**always, **defaults, **without_nulls(stored)}
    for key, value in (("hidden_act", activation), ("in_channels", 3), ("in_chans", 3)):
        if vision[key] != value:
            raise ValueError(f"vision_config.{key} {vision[key]!r} is not supported; supported: {value!r}")
    return vision


def _read(vision: Mapping[str, Any], *, width: int, **others: Any) -> QwenVisionConfig:
    heads = _integer(vision, "num_heads")
    if width % (4 * heads):
        raise ValueError(f"vision_config: {width} channels of a patch are no multiple of 4 for each of num_heads {heads}")
    rope = vision.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", "axial") != "axial":
        raise ValueError(f"vision_config.rope_parameters {rope!r} is not supported; supported: rope_type axial")
    theta = rope.get("rope_theta", 10000.0)
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 < theta < 1e30:
        raise ValueError(f"vision_config.rope_parameters.rope_theta is {theta!r}; expected a number above 0")
    return QwenVisionConfig(
        width=width,
        num_heads=heads,
        depth=_integer(vision, "depth"),
        patch_size=_integer(vision, "patch_size"),
        spatial_merge_size=_integer(vision, "spatial_merge_size"),
        temporal_patch_size=_integer(vision, "temporal_patch_size"),
        rope_theta=float(theta),
        **others,
    )


def _layers(vision: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Numbers of layers, in order."""
    given, depth = vision[key], _integer(vision, "depth")
    if not isinstance(given, Sequence) or not all(type(number) is int and number >= 0 for number in given):
        raise ValueError(f"vision_config.{key} is {given!r}; expected numbers of layers")
    if list(given) != sorted(set(given)):
        raise ValueError(f"vision_config.{key} is {given!r}; expected them in order, each once")
    if given and given[-1] >= depth:
        raise ValueError(f"vision_config.{key} is {given!r}, and there are {depth} layers (depth)")
    return tuple(given)


def _integer(vision: Mapping[str, Any], key: str) -> int:
    value = vision[key]
    value = value[0] if isinstance(value, (list, tuple)) and value and all(side == value[0] for side in value) else value
    if type(value) is not int or value < 1:
        raise ValueError(f"vision_config.{key} is {value!r}; expected a positive integer")
    return value
