"""InternViT with the projector behind it, as one tower, and the names that checkpoints have for it."""

from __future__ import annotations

import torch

from vlserve.vision.config import EncoderConfig
from vlserve.vision.image_config import ImageConfig
from vlserve.vision.internvit_encoder import build_encoder
from vlserve.vision.internvit_names import encoder_targets, original_targets
from vlserve.vision.projector import Projector
from vlserve.vision.tower import TileTower


class InternVit(TileTower):
    def __init__(self, config: EncoderConfig, image_config: ImageConfig, out_size: int) -> None:
        super().__init__(image_config)
        self.encoder = build_encoder(config)
        self.projector = Projector(config, out_size)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.projector(self.encoder.forward_features(x)[:, 1:])  # without the class token

    def targets(self) -> dict[str, torch.Tensor]:
        found = {f"vision_tower.{name}": tensor for name, tensor in encoder_targets(self.encoder)}
        return found | {f"multi_modal_projector.{name}": p.data for name, p in self.projector.named_parameters()}


class OriginalInternVit(InternVit):
    """By the names of OpenGVLab's own format, whose projector is a sequence of four."""

    def targets(self) -> dict[str, torch.Tensor]:
        found = {f"vision_model.{name}": tensor for name, tensor in original_targets(self.encoder)}
        places = {"layer_norm": 0, "linear_1": 1, "linear_2": 3}
        for name, parameter in self.projector.named_parameters():
            module, kind = name.split(".")
            found[f"mlp1.{places[module]}.{kind}"] = parameter.data
        return found
