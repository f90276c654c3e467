"""SigLIP on timm, a two-layer MLP, and vlserve's own decoder. Shapes: N pictures, K patches each, C decoder width."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlserve.llm.tensor_parallel import Split
from vlserve.models.base import Model, build_decoder
from vlserve.vision.image_config import ImageConfig
from vlserve.vision.tower import TileTower

# timm's names for the encoder's parts, and the checkpoint's
NAMES = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class Siglip(TileTower):
    """Encoder and projector to `width` channels."""

    def __init__(self, vision: Mapping[str, Any], image_config: ImageConfig, width: int) -> None:
        super().__init__(image_config)
        self.encoder = VisionTransformer(
            img_size=vision["image_size"],
            patch_size=vision["patch_size"],
            embed_dim=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
            class_token=False,
            num_classes=0,
            global_pool="",
            final_norm=False,
            weight_init="skip",
            norm_layer=partial(nn.LayerNorm, eps=vision.get("layer_norm_eps", 1e-6)),
            act_layer=partial(nn.GELU, approximate="tanh"),
        )
        parts = {"linear_1": nn.Linear(vision["hidden_size"], width), "gelu": nn.GELU(), "linear_2": nn.Linear(width, width)}
        self.projector = nn.Sequential(OrderedDict(parts))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, S, S], normalised -> [N, K, C]."""
        return self.projector(self.encoder.forward_features(x))

    def targets(self) -> dict[str, torch.Tensor]:
        found = {f"vision_tower.{name}": tensor for name, tensor in self._encoder_targets()}
        return found | {f"multi_modal_projector.{name}": p.data for name, p in self.projector.named_parameters()}

    def _encoder_targets(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.encoder.named_parameters():
            if name == "pos_embed":
                yield "embeddings.position_embedding.weight", parameter.data[0]
                continue
            module, kind = name.rsplit(".", 1)
            block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
            prefix, module = (f"encoder.layers.{block[1]}.", block[2]) if block else ("", module)
            if module == "attn.qkv":
                for part, rows in zip("qkv", parameter.data.chunk(3), strict=True):
                    yield f"{prefix}self_attn.{part}_proj.{kind}", rows
            else:
                yield f"{prefix}{NAMES[module]}.{kind}", parameter.data


class Llava(Model):
    def __init__(self, config: Mapping[str, Any], image_config: ImageConfig, split: Split) -> None:
        decoder = build_decoder(config, split)
        super().__init__(decoder, Siglip(config["vision_config"], image_config, decoder.config.hidden_size))

    def rename(self, name: str) -> str | None:
        renamed = super().rename(name)
        if renamed is None or re.match(r"vision_tower\.(vision_model\.)?(post_layernorm|head)\.", renamed):
            return None  # behind the layer whose output is used
        return renamed.replace("vision_tower.vision_model.", "vision_tower.")  # as transformers 4 wrote it
