"""A random decoder layer with biases and shared KV heads, small enough to search in a moment."""

from __future__ import annotations

import torch

from vlserve.kernels.rope import RopeConfig
from vlserve.llm.config import DecoderConfig
from vlserve.llm.layer import DecoderLayer
from vlserve.llm.layer_kinds import LAYER_KINDS
from vlserve.llm.tensor_parallel import Split

CONFIG = DecoderConfig(
    model_type="qwen2",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    rope=RopeConfig(head_dim=16),
    layer_types=("full_attention",),
)


def make_layer() -> DecoderLayer:
    torch.manual_seed(1)
    layer = DecoderLayer(CONFIG, Split(), LAYER_KINDS["full_attention"]).requires_grad_(False).eval()
    for parameter in layer.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.uniform_(0.5, 1.5)
    return layer
