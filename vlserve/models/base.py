"""What the engine asks of a vision-language model, and InternVL: encoder, projector and decoder, and where a checkpoint's
tensors go in it.

Shapes: N tiles, K tokens a tile, T tokens of a step, C hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlserve.kernels.upload import upload
from vlserve.llm.config import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.detect_formats import StoredTensors, use_stored_forms
from vlserve.llm.formats import Slot
from vlserve.llm.parallel import Split
from vlserve.llm.quantisation import Quantisation
from vlserve.llm.shards import read_shards
from vlserve.llm.weights import load_weights, slot_of
from vlserve.vision.config import TILES_AT_ONCE, ImageConfig
from vlserve.vision.preprocess import normalise


class Model(nn.Module, ABC):
    """A model has a `decoder`, turns tiles into `features`, and knows the `targets` of a checkpoint's tensors.

    It is built on torch's meta device, so its constructor computes nothing; then `load` fills every parameter.
    """

    decoder: Decoder

    def __init__(self, image_config: ImageConfig) -> None:
        super().__init__()
        self.image_config = image_config
        self._mean_std: tuple[torch.Tensor, torch.Tensor] | None = None  # on the model's device, from the first tiles on

    @abstractmethod
    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised tiles [N, 3, S, S] on the model's device and in its type -> features [N, K, C]."""

    @abstractmethod
    def targets(self) -> dict[str, torch.Tensor | Slot]:
        """Checkpoint names, as `rename` gives them, to what they fill: a tensor, or a slot that takes a part."""

    def rename(self, name: str) -> str | None:
        """A checkpoint's name to the one in `targets`; None for a tensor to pass over on purpose.

        The names within transformers' models (`model.language_model.`, `lm_head.`) become those that it saves.
        """
        if name.startswith("model."):
            name = name.removeprefix("model.")
            if name.startswith("language_model.") and not name.startswith("language_model.model."):
                name = "language_model.model." + name.removeprefix("language_model.")
        elif name.startswith("lm_head."):
            name = "language_model." + name
        passed_over = name.endswith("rotary_emb.inv_freq") or (
            self.decoder.lm_head is None and name == "language_model.lm_head.weight"
        )
        return None if passed_over else name

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tiles [N, 3, S, S] uint8, from anywhere -> features [N, K, C] on the model's device."""
        weight, config = self.decoder.norm, self.image_config
        if self._mean_std is None:
            self._mean_std = upload(config.mean, torch.float32, weight.device), upload(config.std, torch.float32, weight.device)
        parts = (part.to(weight.device, non_blocking=True) for part in pixels.split(TILES_AT_ONCE))
        return torch.cat([self.features(normalise(tiles, *self._mean_std).to(weight.dtype)) for tiles in parts])

    def load(self, folder: Path, progress: Callable[[int, int], None]) -> int:
        """Fill all parameters from `folder`; returns the bytes read. Errors as `load_weights`."""
        shards = read_shards(folder)
        if shards is None:
            num_bytes = load_weights(folder, self.targets(), rename=self.rename, progress=progress)
        else:
            parts = {name: slot_of(target).tensor for name, target in self.targets().items()}  # stored as this rank has them
            files = shards.files(folder, self.decoder.split.group.rank)
            num_bytes = load_weights(folder, parts, files=files, progress=progress)
        self.decoder.finish()
        return num_bytes

    def use_stored_forms(self, folder: Path, quantisation: Quantisation | None, dtype: torch.dtype) -> None:
        """Make the decoder's linear layers such as `folder` has them; on the meta device, with all other types settled.

        Raises ValueError for a form that is not supported, FileNotFoundError.
        """
        if read_shards(folder) is not None:
            return  # only dense checkpoints are sharded
        with StoredTensors(folder, self.rename) as tensors:
            use_stored_forms(self.decoder, self._decoder_prefix(), tensors, quantisation, dtype)

    def _decoder_prefix(self) -> str:
        """What the names in `targets` have before the decoder's own."""
        last = next(iter(self.decoder.targets()))
        return next(name for name in self.targets() if name.endswith(last)).removesuffix(last)


def build_decoder(config: Mapping[str, Any], split: Split) -> Decoder:
    """This rank's part of the decoder that `text_config` of a whole config.json describes; raises ValueError naming the key."""
    text = dict(config.get("text_config") or {})
    # transformers ties the head when either the outer or the text config says so
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    return Decoder(read_decoder_config(text), split)
