"""config.json from one format to the other. Raises ConfigError naming the key that the other format cannot say. No torch.

Source: convert_internvl_weights_to_hf.py of transformers, for the keys that are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlserve.convert.tensors import ALL_LLAMAS
from vlserve.errors import ConfigError
from vlserve.llm.config import DecoderConfig
from vlserve.llm.config_readers import with_defaults
from vlserve.llm.quantisation import SECTIONS
from vlserve.models.checkpoint import Checkpoint
from vlserve.models.internvl_chat import DECODERS, TOKENS
from vlserve.models.tiles import TilePreprocessor
from vlserve.vision.config import EncoderConfig, read_encoder_config
from vlserve.vision.image_config import IMAGENET_MEAN, IMAGENET_STD, ImageConfig
from vlserve.vision.original_config import read_original_encoder

LLAMA = "LlamaForCausalLM"
_CLASSES = {model_type: name for name, model_type in DECODERS.items()}
_LEFT_OUT = ("_name_or_path", "_commit_hash", "auto_map", "attn_implementation", "quantization_config", "dtype", "use_bfloat16")
_OF_INTERNLM = ("bias", "qkv_bias", "pretraining_tp")
_MODULES = {"vision_model": "vision_tower", "mlp1": "multi_modal_projector"}
HEAD = "lm_head"
_OUTSIDE = (*_MODULES, *_MODULES.values(), HEAD, "output")  # the last is InternLM2's head
_NOT_QUANTISED = ("modules_to_not_convert", "ignore", "ignored_layers")


def tiles_of(checkpoint: Checkpoint) -> TilePreprocessor:
    preprocessor = checkpoint.preprocessor
    assert isinstance(preprocessor, TilePreprocessor), "both formats are tiled"
    return preprocessor


def hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """transformers' config.json of a checkpoint in OpenGVLab's format."""
    config, preprocessor = checkpoint.config, tiles_of(checkpoint)
    encoder, image = read_original_encoder(config), preprocessor.image
    decoder = checkpoint.architecture.decoder(config)
    if encoder.transposed_tokens:
        raise ConfigError("ps_version v1 has no counterpart in transformers, whose pixel shuffle is v2")
    _check_tiling(image)
    text = _hf_text(config["llm_config"], decoder)
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": encoder.downsample_ratio,
        "image_seq_length": encoder.tokens_per_tile,
        "image_token_id": preprocessor.image_token_id,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        **_quantisation(config, "hf"),
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": config.get("dtype"),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_bias": encoder.attention_bias,
            "hidden_act": "gelu",
            **_sizes(encoder),
            "image_size": [encoder.image_size] * 2,
            "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision",
            "patch_size": [encoder.patch_size] * 2,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": encoder.use_qk_norm,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def original_config(checkpoint: Checkpoint, template: str) -> dict[str, Any]:
    """OpenGVLab's config.json of a checkpoint in transformers' format, without `auto_map`: its code is not written."""
    config, preprocessor = checkpoint.config, tiles_of(checkpoint)
    encoder, image = read_encoder_config(config), preprocessor.image
    _check_pixels(image)
    if preprocessor.tokens != TOKENS:
        raise ConfigError(f"the tokens around pictures are {preprocessor.tokens}; in OpenGVLab's format they are always {TOKENS}")
    text = _original_text(config["text_config"]) | {"torch_dtype": config.get("dtype")}
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": encoder.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": encoder.image_size,
        "hidden_size": text["hidden_size"],
        "llm_config": text,
        "max_dynamic_patch": image.max_patches,
        "min_dynamic_patch": image.min_patches,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        **_quantisation(config, "original"),
        "select_layer": -1,
        "template": template,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": config.get("dtype"),
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "hidden_act": "gelu",
            **_sizes(encoder),
            "image_size": encoder.image_size,
            "model_type": "intern_vit_6b",
            "patch_size": encoder.patch_size,
            "qk_normalization": encoder.use_qk_norm,
            "qkv_bias": encoder.attention_bias,
            "use_flash_attn": True,
        },
    }


def _sizes(encoder: EncoderConfig) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "layer_norm_eps", "norm_type", "num_attention_heads", "num_hidden_layers")
    return {name: getattr(encoder, name) for name in names} | {"num_channels": 3}


def _hf_text(llm: Mapping[str, Any], decoder: DecoderConfig) -> dict[str, Any]:
    text = {key: value for key, value in llm.items() if key not in _LEFT_OUT}
    if decoder.model_type not in ALL_LLAMAS:
        return text | {"model_type": decoder.model_type}
    if decoder.qkv_bias != decoder.output_bias:
        raise ConfigError(
            f"llm_config has qkv_bias {decoder.qkv_bias} and bias {decoder.output_bias}; in transformers' format it is a Llama, "
            "whose query, key, value and output have biases together"
        )
    text = {key: value for key, value in with_defaults(text).items() if key not in _OF_INTERNLM}
    biases = {"attention_bias": decoder.output_bias, "mlp_bias": decoder.mlp_bias}
    return text | biases | {"architectures": [LLAMA], "model_type": "llama"}


def _original_text(text: Mapping[str, Any]) -> dict[str, Any]:
    name = _CLASSES.get(text["model_type"])
    if name is None:
        raise ConfigError(
            f"text_config.model_type {text['model_type']!r} has no counterpart in OpenGVLab's format, which has "
            f"{', '.join(DECODERS)}"
        )
    llm = {key: value for key, value in text.items() if key not in _LEFT_OUT}
    rope = llm.pop("rope_parameters", None)  # transformers 5, which OpenGVLab's code is older than
    if isinstance(rope, Mapping) and not any(isinstance(value, Mapping) for value in rope.values()):
        rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        llm |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        kind = rest.get("rope_type", rest.get("type", "default"))
        if not llm.get("rope_scaling"):
            llm["rope_scaling"] = None if kind == "default" else rest | {"rope_type": kind, "type": kind}
    return llm | {"architectures": [name]}


def _quantisation(config: Mapping[str, Any], to: str) -> dict[str, Any]:
    """`quantization_config`, at the top, with the names that modules outside the decoder's layers have in the other format."""
    places = (config.get(section) if section else config for section in SECTIONS)
    given = next((place["quantization_config"] for place in places if place and place.get("quantization_config")), None)
    if given is None:
        return {}
    dense = (*(_MODULES.values() if to == "hf" else _MODULES), HEAD)  # only the decoder's layers are quantised
    lists: dict[str, Any] = {}
    for key in _NOT_QUANTISED:
        if key in given:
            within = [name for name in given[key] or () if not any(module in name for module in _OUTSIDE)]
            lists[key] = within + [f"re:.*{name}.*" if key == "ignore" else name for name in dense]
    if isinstance(given.get("dynamic"), Mapping):
        rules = {pattern: rule for pattern, rule in given["dynamic"].items() if not any(name in pattern for name in _OUTSIDE)}
        lists["dynamic"] = rules | {f"-:.*{name}.*": {} for name in dense}
    if "block_name_to_quantize" in given:
        lists["block_name_to_quantize"] = "model.language_model.layers" if to == "hf" else "language_model.model.layers"
    if given.get("quant_method") == "awq":
        lists.setdefault("modules_to_not_convert", list(dense))
    return {"quantization_config": {**given, **lists}}


def _check_tiling(image: ImageConfig) -> None:
    """What transformers' processor does always."""
    if not image.dynamic and image.pad_to_square:
        raise ConfigError("pad2square true has no counterpart in transformers, whose processor never pads a picture")
    if image.dynamic and not image.thumbnail and image.max_patches > 1:
        raise ConfigError("use_thumbnail false has no counterpart in transformers, whose processor always adds a thumbnail")


def _check_pixels(image: ImageConfig) -> None:
    """What OpenGVLab's code does always."""
    fixed = {"resample": "bicubic", "rescale_factor": 1 / 255, "do_normalize": True, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    for key, value in fixed.items():
        if getattr(image, key) != value:
            raise ConfigError(f"the image processor's {key} is {getattr(image, key)}; in OpenGVLab's format it is always {value}")
