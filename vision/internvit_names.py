"""Which tensors of a checkpoint fill which parameters of timm's encoder: transformers' names, and OpenGVLab's own."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
}
_IN_BLOCK = {
    "attn.proj": "attention.projection_layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def encoder_targets(encoder: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(checkpoint name, the part of a parameter that it fills); query, key and value share one."""
    for name, parameter in encoder.named_parameters():
        if name in _EMBEDDINGS:
            yield _EMBEDDINGS[name], parameter.data
            continue
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias|gamma)", name)
        assert match, f"the encoder has a parameter {name} that no checkpoint name stands for"
        layer, module, kind = f"encoder.layer.{match[1]}.", match[2], match[3]
        if module in ("ls1", "ls2"):
            yield f"{layer}lambda_{module[-1]}", parameter.data
        elif module == "attn.qkv":
            for part, rows in zip("qkv", parameter.data.chunk(3), strict=True):
                yield f"{layer}attention.{part}_proj.{kind}", rows
        else:
            yield f"{layer}{_IN_BLOCK[module]}.{kind}", parameter.data


_ORIGINAL = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}


def original_targets(encoder: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """As `encoder_targets`, by OpenGVLab's names: timm's but for the embeddings and the layer scales."""
    for name, parameter in encoder.named_parameters():
        in_layers = re.sub(r"^blocks\.(\d+)\.", r"encoder.layers.\1.", name)
        yield _ORIGINAL.get(name, in_layers.removesuffix(".gamma")), parameter.data
