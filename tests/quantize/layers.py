"""A random decoder layer with biases and shared KV heads, small enough to search in a moment."""

from __future__ import annotations

from dataclasses import replace

import torch

from vlserve.kernels.rope import RopeConfig
from vlserve.llm.config import DecoderConfig, ExpertsConfig
from vlserve.llm.layer import DecoderLayer
from vlserve.llm.layer_kinds import LAYER_KINDS
from vlserve.llm.tensor_parallel import Split
from vlserve.quantize.layer import Recipe

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


def moe_layer() -> tuple[DecoderConfig, dict[str, torch.Tensor]]:
    """(the config, what quantize_experts reads of a layer with four experts, two a token)"""
    torch.manual_seed(1)
    experts = ExpertsConfig(layers=(0,), num_experts=4, top_k=2, width=32, norm_topk_prob=True)
    shapes = {f"mlp.experts.{i}.{part}_proj.weight": (32, 64) for i in range(4) for part in ("gate", "up")}
    shapes |= {f"mlp.experts.{i}.down_proj.weight": (64, 32) for i in range(4)} | {"mlp.gate.weight": (4, 64)}
    stored = {name: torch.empty(shape).normal_(0, shape[1] ** -0.5).bfloat16() for name, shape in shapes.items()}
    norm = {"post_attention_layernorm.weight": torch.empty(64).uniform_(0.5, 1.5).bfloat16()}
    return replace(CONFIG, experts=experts), stored | norm


def awq_recipe() -> Recipe:
    return Recipe(method="awq", group_size=32, scale_dtype=torch.float16)
