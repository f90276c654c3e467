"""Text configs of the field are read right, and what the decoder cannot do is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from vlserve.llm.config import read_decoder_config

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
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
        ({"sliding_window": 128, "use_sliding_window": True}, "sliding_window 128"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is no multiple of num_key_value_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vocab_size": None}, "text_config.vocab_size is None"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_decoder_config(BASE | change)


def test_an_unused_sliding_window_is_no_matter() -> None:
    assert read_decoder_config(BASE | {"sliding_window": 4096, "use_sliding_window": False}).hidden_size == 64
