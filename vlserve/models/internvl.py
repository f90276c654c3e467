"""InternVL in transformers' format (`model_type: internvl`): InternViT, pixel shuffle with an MLP, and a Llama-shaped decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vlserve.llm.formats import Slot
from vlserve.llm.parallel import Split
from vlserve.models.base import Model, build_decoder
from vlserve.vision.config import ImageConfig, read_encoder_config
from vlserve.vision.encoder import build_encoder
from vlserve.vision.names import encoder_targets
from vlserve.vision.projector import Projector


class InternVL(Model):
    """InternViT, pixel shuffle with an MLP, and a Llama-shaped decoder."""

    def __init__(self, config: Mapping[str, Any], image_config: ImageConfig, split: Split) -> None:
        super().__init__(image_config)
        vision = read_encoder_config(config)
        self.decoder = build_decoder(config, split)
        self.encoder = build_encoder(vision)
        self.projector = Projector(vision, self.decoder.config.hidden_size)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.projector(self.encoder.forward_features(x)[:, 1:])  # without the class token

    def targets(self) -> dict[str, torch.Tensor | Slot]:
        """Checkpoint names, as transformers saves InternVL, to what they fill."""
        found: dict[str, torch.Tensor | Slot] = {f"vision_tower.{name}": tensor for name, tensor in encoder_targets(self.encoder)}
        found.update({f"multi_modal_projector.{name}": p.data for name, p in self.projector.named_parameters()})
        found.update({f"language_model.{name}": tensor for name, tensor in self.decoder.targets().items()})
        return found
