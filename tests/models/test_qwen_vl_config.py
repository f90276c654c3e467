"""What config.json says of Qwen-VL models, in the layouts that are published: sizes, positions, names, and the plan."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vlserve.llm.formats import Slot
from vlserve.llm.tensor_parallel import Split
from vlserve.models.qwen2_5_vl import QWEN2_5_VL
from vlserve.models.qwen2_vl import QWEN2_VL, decoder
from vlserve.models.qwen3_vl import QWEN3_VL
from vlserve.models.registry import find_architecture
from vlserve.plan.tp_plan import make_plan

TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
OLDER = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_scaling": MROPE,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_cache": True,
    "use_sliding_window": False,
    **TOKENS,
    "vision_token_id": 151654,
}
SIZES_2B = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28}
SIZES_2B |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
SIZES_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28}
SIZES_7B |= {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}
AWQ = {"bits": 4, "group_size": 128, "modules_to_not_convert": ["visual"], "quant_method": "awq", "version": "gemm"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B-Instruct-AWQ": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **OLDER,
        **SIZES_2B,
        "torch_dtype": "float16",
        "quantization_config": {**AWQ, "zero_point": True},
        "vision_config": {"hidden_size": 1536, "in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
    },
    "Qwen2-VL-7B-Instruct": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **OLDER,
        **SIZES_7B,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    },
    "Qwen2.5-VL-7B-Instruct": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **OLDER,
        **SIZES_7B,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 128000,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    },
    "Qwen3-VL-4B-Instruct": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **TOKENS,
        "tie_word_embeddings": True,
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "head_dim": 128,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "use_cache": True,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17],
            "depth": 24,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024,
            "in_channels": 3,
            "intermediate_size": 4096,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_transformers(name: str) -> None:
    """At full size, without memory: each of its tensors, by its newest name, fills one of ours, and none is left."""
    import transformers

    config = PUBLISHED[name]
    model_class = getattr(transformers, config["architectures"][0])
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        theirs = model_class(transformers.AutoConfig.for_model(**json.loads(json.dumps(plain))))
    family = find_architecture(config)
    with torch.device("meta"):
        ours = family.build(config, family.preprocessor(config, {}), Split())
    targets = {key: target.full if isinstance(target, Slot) else tuple(target.shape) for key, target in ours.targets().items()}
    renamed = {ours.rename(key): tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    renamed.pop(None, None)  # a head that is the embedding
    assert renamed == targets
    plan = make_plan(config, tp=2)
    assert plan.supported and plan.ok and plan.image_tokens == 16384
    visual = sum(parameter.numel() for parameter in theirs.model.visual.parameters())
    assert plan.ranks[0].vision_bytes == 2 * visual


def test_frequencies_of_the_axes() -> None:
    older, newer = decoder(PUBLISHED["Qwen2-VL-7B-Instruct"]), QWEN3_VL.decoder(PUBLISHED["Qwen3-VL-4B-Instruct"])
    assert older.mrope_axes == (0,) * 16 + (1,) * 24 + (2,) * 24 and older.deep_layers == ()
    assert newer.mrope_axes == (0, 1, 2) * 20 + (0,) * 4 and newer.deep_layers == (0, 1, 2)
    assert (older.qkv_bias, older.qk_norm, older.rope.theta, older.sliding_window) == (True, False, 1e6, None)
    assert (newer.qkv_bias, newer.qk_norm, newer.rope.theta, newer.tie_word_embeddings) == (False, True, 5e6, True)


def test_layouts_that_say_the_same() -> None:
    """As published; as transformers 4 saved it, with the text's keys in both places; as transformers 5 does."""
    flat = PUBLISHED["Qwen2.5-VL-7B-Instruct"]
    keys = {*SIZES_7B, *OLDER} - {*TOKENS, "vision_token_id", "rope_scaling", "rope_theta", "tie_word_embeddings"}
    text = {key: flat[key] for key in keys}
    doubled = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    both = flat | {
        "rope_scaling": doubled,
        "text_config": {**text, "model_type": "qwen2_5_vl_text", "rope_theta": 1e6, "rope_scaling": doubled},
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    newest = {key: value for key, value in flat.items() if key not in {*keys, "rope_scaling", "rope_theta"}}
    newest |= {"text_config": {**text, "model_type": "qwen2_5_vl_text", "rope_parameters": rope}}
    typed = flat | {"rope_scaling": {"rope_type": "mrope", "mrope_section": [16, 24, 24]}}
    assert len({decoder(config) for config in (flat, both, newest, typed)}) == 1


def test_longer_contexts_by_yarn() -> None:
    """As the model's page has it."""
    scaling = {"type": "yarn", "mrope_section": [16, 24, 24], "factor": 4, "original_max_position_embeddings": 32768}
    found = decoder(PUBLISHED["Qwen2.5-VL-7B-Instruct"] | {"rope_scaling": scaling, "max_position_embeddings": 32768})
    assert (found.rope.rope_type, found.rope.factor, found.longest_context) == ("yarn", 4.0, 131072)
    assert found.mrope_axes == decoder(PUBLISHED["Qwen2.5-VL-7B-Instruct"]).mrope_axes


@pytest.mark.parametrize(
    "name,place,changed,message",
    (
        ("Qwen2-VL-7B-Instruct", "", {"rope_scaling": {**MROPE, "mrope_section": [16, 24]}}, r"mrope_section is \[16, 24\]"),
        ("Qwen2-VL-7B-Instruct", "", {"rope_scaling": {**MROPE, "mrope_section": [8, 8, 8]}}, "64 in all"),
        ("Qwen2-VL-7B-Instruct", "", {"rope_scaling": {**MROPE, "mrope_interleaved": True}}, "mrope_interleaved True"),
        ("Qwen2-VL-7B-Instruct", "", {"hidden_act": "gelu"}, "^hidden_act 'gelu'"),
        ("Qwen2-VL-7B-Instruct", "", {"vision_config": None}, "vision_config is None"),
        ("Qwen2-VL-7B-Instruct", "vision_config", {"hidden_size": 1280}, "features of 1280 .* takes 3584"),
        ("Qwen2-VL-7B-Instruct", "vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act 'gelu'"),
        ("Qwen2-VL-7B-Instruct", "vision_config", {"in_chans": 4}, "vision_config.in_chans 4"),
        ("Qwen2-VL-7B-Instruct", "vision_config", {"num_heads": 3}, "num_heads 3"),
        ("Qwen2-VL-7B-Instruct", "vision_config", {"mlp_ratio": 0}, "mlp_ratio is 0"),
        ("Qwen2.5-VL-7B-Instruct", "vision_config", {"fullatt_block_indexes": [7, 32]}, "there are 32 layers"),
        ("Qwen2.5-VL-7B-Instruct", "vision_config", {"window_size": 14}, "window_size is 14 pixels; a feature has 28"),
        ("Qwen3-VL-4B-Instruct", "vision_config", {"deepstack_visual_indexes": [11, 5]}, "in order"),
        ("Qwen3-VL-4B-Instruct", "vision_config", {"num_position_embeddings": 2300}, "num_position_embeddings is 2300"),
        ("Qwen3-VL-4B-Instruct", "text_config", {"num_hidden_layers": 2}, "deepstack_visual_indexes has 3, and the decoder 2"),
        ("Qwen3-VL-4B-Instruct", "text_config", {"hidden_act": "gelu"}, "text_config.hidden_act 'gelu'"),
        *(
            ("Qwen2-VL-7B-Instruct", "vision_config", {"rope_parameters": {"rope_theta": given}}, "rope_parameters.rope_theta is")
            for given in (-1, 0, None, "x", 10**400)
        ),
        ("Qwen3-VL-4B-Instruct", "", {"rope_theta": 1e6}, "config.json has rope_theta at its top level"),
    ),
)
def test_what_cannot_be_followed_is_named(name: str, place: str, changed: dict[str, Any], message: str) -> None:
    config = PUBLISHED[name]
    config = config | ({place: config[place] | changed} if place else changed)
    family = find_architecture(config)
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        family.build(config, family.preprocessor(config, {}), Split())


def test_the_registry_knows_them() -> None:
    found = [find_architecture({"model_type": kind}) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")]
    assert found == [QWEN2_VL, QWEN2_5_VL, QWEN3_VL]
