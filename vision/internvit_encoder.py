"""InternViT on timm's VisionTransformer, with our own attention, norms and walk through the blocks for fused kernels.

timm's classes are used for everything else; its `qk_norm` is per head, InternViT-6B's is over the full
width, hence `EncoderAttention`. The encoder is never split over ranks. Shapes: N tiles, P patches a
tile, C width.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlserve.kernels.norms import add_scaled_norm, layer_norm, rms_norm
from vlserve.vision.config import EncoderConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm as a module, for timm's `norm_layer`."""

    bias = None

    def __init__(self, width: int, eps: float = 1e-6, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, **factory))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """With our kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class Blocks(nn.Sequential):
    """timm's blocks, each of which is x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x)).

    Scale, sum and the norm that comes next, which may be the next block's, are one operation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, P, C] -> [N, P, C]."""
        blocks: list[Any] = list(self)
        normed = blocks[0].norm1(x)
        for block, following in pairwise(blocks):
            normed, x = _add(block.attn(normed), x, block.ls1, block.norm2)
            normed, x = _add(block.mlp(normed), x, block.ls2, following.norm1)
        last = blocks[-1]
        normed, x = _add(last.attn(normed), x, last.ls1, last.norm2)
        return x + last.ls2(last.mlp(normed))


class EncoderAttention(nn.Module):
    """Full attention over a tile's patches, optionally with a norm over the whole query and key width."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, qk_norm: bool, **unused: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = RMSNorm(dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, attn_mask: None = None, is_causal: bool = False) -> torch.Tensor:
        """x [N, P, C] -> [N, P, C]; timm's block passes the two last arguments, always at their defaults."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        heads = [t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (self.q_norm(query), self.k_norm(key), value)]
        out = F.scaled_dot_product_attention(*heads)
        return self.proj(out.transpose(1, 2).flatten(2))


def _add(
    branch: torch.Tensor, residual: torch.Tensor, layer_scale: LayerScale, norm: RMSNorm | LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    return add_scaled_norm(branch, residual, layer_scale.gamma, norm.weight, norm.bias, norm.eps)


def build_encoder(config: EncoderConfig) -> VisionTransformer:
    """The encoder without weights; its parameters' names are timm's."""
    norm = RMSNorm if config.norm_type == "rms_norm" else LayerNorm
    encoder = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=config.attention_bias,
        init_values=1.0,  # any value: makes timm build the layer scales, whose weights are loaded
        num_classes=0,
        global_pool="token",
        final_norm=False,
        weight_init="skip",
        norm_layer=partial(norm, eps=config.layer_norm_eps),
        qk_norm=config.use_qk_norm,
        attn_layer=EncoderAttention,
    )
    encoder.blocks = Blocks(*encoder.blocks)
    return encoder
