"""Text configs of the field are read right, and what the decoder cannot do is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlserve.llm.config_readers import read_decoder_config

BASE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


MOE = {"model_type": "qwen3_moe"}
LONG = {"rope_scaling": {"rope_type": "longrope"}}


def test_variations_of_the_shape() -> None:
    qwen2 = read_decoder_config(BASE)
    assert qwen2.qkv_bias and not qwen2.qk_norm and qwen2.head_dim == 8 and not qwen2.output_bias
    qwen3 = read_decoder_config(BASE | {"model_type": "qwen3", "head_dim": 32})
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 32
    llama = read_decoder_config(
        BASE | {"model_type": "llama", "num_key_value_heads": None, "mlp_bias": True, "attention_bias": True}
    )
    assert llama.num_key_value_heads == 8 and llama.mlp_bias and llama.output_bias


def test_rope_in_both_spellings() -> None:
    new = read_decoder_config(BASE | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}})
    old = read_decoder_config(BASE | {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert new.rope == old.rope and new.rope.theta == 5e5 and new.rope.original_max_positions == 512


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: gpt_oss, internlm2, internlm3"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0, and layer_types has sliding_attention"),
        ({"layer_types": ["sliding_attention"] * BASE["num_hidden_layers"]}, "sliding_window is None"),
        ({"model_type": "mistral", "sliding_window": True}, "sliding_window is True"),
        ({"use_sliding_window": True, "sliding_window": "9", "max_window_layers": 0}, "sliding_window is '9'"),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": "2"}, "max_window_layers is '2'"),
        ({"layer_types": "full_attention"}, "layer_types 'full_attention' is not supported"),
        ({"layer_types": 2}, "layer_types 2 is not supported"),
        ({"layer_types": [["full_attention"], 1]}, "layer_types .* is not supported"),
        ({"layer_types": ["full_attention"]}, f"expected {BASE['num_hidden_layers']} of full_attention, sliding_attention"),
        ({"layer_types": ["linear_attention"] * BASE["num_hidden_layers"]}, "layer_types .*linear_attention.* is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vocab_size": 0}, "text_config.vocab_size is 0"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        (
            LONG | {"original_max_position_embeddings": 0.5},
            "original_max_position_embeddings is 0; expected a whole number above 1",
        ),
        (
            LONG | {"original_max_position_embeddings": 1},
            "original_max_position_embeddings is 1; expected a whole number above 1",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (MOE | {"num_experts": 4}, "num_experts_per_tok 8 is more than num_experts 4"),
        (MOE | {"num_experts": -1}, "num_experts is -1; expected a positive integer"),
        (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; expected a positive integer"),
        (MOE | {"mlp_only_layers": "0"}, "mlp_only_layers is '0'; expected a list of layers' numbers"),
        (MOE | {"moe_intermediate_size": "768"}, "moe_intermediate_size is '768'"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_decoder_config(BASE | change)


@pytest.mark.parametrize(
    "settings",
    [
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 99},
        {"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0, "head_dim": 16},
        {"model_type": "mistral", "sliding_window": 32},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral"},
        {"model_type": "llama", "sliding_window": 32},
        {"model_type": "qwen3_moe", "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1},
        {"model_type": "qwen3_moe", "sliding_window": 32, "max_window_layers": 1},
        {"model_type": "qwen3_moe", "use_sliding_window": True},
    ],
    ids=str,
)
def test_which_layers_have_a_window_is_what_transformers_says(settings: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    given = BASE | settings
    read = read_decoder_config(given)
    theirs = CONFIG_MAPPING[given["model_type"]](**{k: v for k, v in given.items() if k != "model_type"})
    window = getattr(theirs, "sliding_window", None) if given["model_type"] != "llama" else None
    default = ["full_attention" if window is None else "sliding_attention"] * theirs.num_hidden_layers
    assert list(read.layer_types) == (getattr(theirs, "layer_types", None) or default)
    assert read.sliding_window == (window if "sliding_attention" in read.layer_types else None)


@pytest.mark.parametrize(
    "settings,layers",
    [
        ({}, (0, 1, 2, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [0, 3], "norm_topk_prob": True}, (1, 2)),
        ({"mlp_only_layers": None, "num_local_experts": 16, "num_experts_per_tok": 2}, (0, 1, 2, 3)),
        ({"mlp_only_layers": [0, 1, 2, 3]}, ()),
        ({"num_experts": 0}, ()),
    ],
    ids=str,
)
def test_which_layers_have_experts_is_what_transformers_says(settings: dict[str, Any], layers: tuple[int, ...]) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    given = BASE | MOE | {"num_hidden_layers": 4, "moe_intermediate_size": 8} | settings
    theirs = Qwen3MoeConfig(**{key: value for key, value in given.items() if key != "model_type"})
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(theirs)
    assert tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")) == layers
    read = read_decoder_config(given).experts
    assert (() if read is None else read.layers) == layers
    if read is not None:
        sizes = (read.num_experts, read.top_k, read.width, read.norm_topk_prob)
        assert sizes == (theirs.num_experts, theirs.num_experts_per_tok, theirs.moe_intermediate_size, theirs.norm_topk_prob)
