"""LLaVA with a SigLIP encoder for vlserve: what its front process needs to know. No torch here; `model` has it.

These are the checkpoints of llava-hf/llava-interleave-qwen-0.5b-hf's kind. A picture is one square, resized without
regard to its shape, and all of the encoder's patches become tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlserve import Architecture
from vlserve.models.tiles import TilePreprocessor, image_processor_settings, image_token_id, image_tokens
from vlserve.vision.image_config import ImageConfig, read_pixel_settings

if TYPE_CHECKING:
    from vlserve.llm.tensor_parallel import Split
    from vlserve_llava.model import Llava

# SiglipImageProcessor's own settings, where the file has none
SIGLIP: Mapping[str, Any] = {
    "do_resize": True,
    "do_center_crop": None,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": (0.5,) * 3,
    "image_std": (0.5,) * 3,
}


def preprocessor(config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> TilePreprocessor:
    return TilePreprocessor(
        image=read_image_config(config, image_processor_settings(files)),
        tokens=image_tokens(files, ("", "<image>", "")),
        image_token_id=image_token_id(config),
    )


def read_image_config(config: Mapping[str, Any], processor: Mapping[str, Any]) -> ImageConfig:
    vision = config["vision_config"]
    defaults = {"hidden_act": "gelu_pytorch_tanh", "projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    needed = {"model_type": "siglip_vision_model", "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    given = {**defaults, **config, **{key: vision[key] for key in ("model_type", "hidden_act") if key in vision}}
    for key, value in (defaults | needed).items():
        if given.get(key) != value:
            raise ValueError(f"{key} {given.get(key)!r} is not supported; supported: {value!r}")
    size = int(vision["image_size"])
    processor = {**SIGLIP, "size": {"height": size, "width": size}, **processor}
    if processor["size"] != {"height": size, "width": size} or not processor["do_resize"] or processor["do_center_crop"]:
        raise ValueError(f"size, do_resize and do_center_crop of the image processor do not give the encoder's {size} pixels")
    return ImageConfig(
        tile_size=size,
        tokens_per_tile=(size // int(vision["patch_size"])) ** 2,
        dynamic=False,
        **read_pixel_settings(processor),
    )


def build(config: Mapping[str, Any], preprocessor: TilePreprocessor, split: Split) -> Llava:
    from vlserve_llava.model import Llava

    return Llava(config, preprocessor.image, split)


LLAVA = Architecture(preprocessor=preprocessor, build=build)
