"""A vision-language model: encoder, projector and decoder, and where a checkpoint's tensors go in it.

Shapes: N tiles, K tokens a tile, T tokens of a step, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlserve.llm.config import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.weights import load_weights
from vlserve.vision.config import ImageConfig, read_encoder_config
from vlserve.vision.encoder import build_encoder
from vlserve.vision.names import encoder_targets
from vlserve.vision.preprocess import normalise
from vlserve.vision.projector import Projector

TILES_AT_ONCE = 16  # bounds the encoder's peak memory


class InternVL(nn.Module):
    """InternViT, pixel shuffle with an MLP, and a Llama-shaped decoder."""

    def __init__(self, config: Mapping[str, Any], image_config: ImageConfig) -> None:
        super().__init__()
        vision = read_encoder_config(config)
        text = dict(config.get("text_config") or {})
        # transformers ties the head when either the outer or the text config says so
        text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
        decoder = read_decoder_config(text)
        self.image_config = image_config
        self.encoder = build_encoder(vision)
        self.projector = Projector(vision, decoder.hidden_size)
        self.decoder = Decoder(decoder)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tiles [N, 3, S, S] uint8 on the CPU -> features [N, K, C] on the model's device."""
        weight = self.projector.linear_1.weight
        mean, std = (torch.tensor(v, device=weight.device) for v in (self.image_config.mean, self.image_config.std))
        features = []
        for tiles in pixels.split(TILES_AT_ONCE):
            x = normalise(tiles.to(weight.device), mean, std).to(weight.dtype)
            features.append(self.projector(self.encoder.forward_features(x)[:, 1:]))  # without the class token
        return torch.cat(features)

    def targets(self) -> dict[str, torch.Tensor]:
        """Checkpoint names, as transformers saves InternVL, to the tensors that they fill."""
        found = {f"vision_tower.{name}": tensor for name, tensor in encoder_targets(self.encoder)}
        found.update({f"multi_modal_projector.{name}": p.data for name, p in self.projector.named_parameters()})
        found.update({f"language_model.{name}": tensor for name, tensor in self.decoder.targets().items()})
        return found

    def load(self, folder: Path, progress: Callable[[int, int], None]) -> int:
        """Fill all parameters from `folder`; returns the bytes read. Errors as `load_weights`."""
        tied = self.decoder.lm_head is None

        def rename(name: str) -> str | None:
            name = _canonical(name)
            passed_over = name.endswith("rotary_emb.inv_freq") or (tied and name == "language_model.lm_head.weight")
            return None if passed_over else name

        return load_weights(folder, self.targets(), rename=rename, progress=progress)


def _canonical(name: str) -> str:
    """transformers' names inside the model (`model.language_model.`, `lm_head.`) to those that it saves."""
    if name.startswith("model."):
        name = name.removeprefix("model.")
        if name.startswith("language_model.") and not name.startswith("language_model.model."):
            name = "language_model.model." + name.removeprefix("language_model.")
    elif name.startswith("lm_head."):
        name = "language_model." + name
    return name
