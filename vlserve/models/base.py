"""A rank's model: a decoder, a tower that encodes, and where a checkpoint's tensors go in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlserve.llm.config_readers import read_text_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.decoders import make_decoder
from vlserve.llm.detect_formats import StoredTensors, use_stored_formats
from vlserve.llm.formats import Slot
from vlserve.llm.quantisation import Quantisation
from vlserve.llm.shards import read_shards
from vlserve.llm.stored_names import Renamed, own_names
from vlserve.llm.tensor_parallel import Split
from vlserve.llm.weights import load_weights, slot_of
from vlserve.vision.tower import Tower


class Model(nn.Module):
    """A decoder, and a tower where the model can see. It is built on torch's meta device, then `load` fills every parameter.

    Args:
        decoder: this rank's part. tower: whole on every rank; its levels of features are those that the decoder takes.
        prefix: what a checkpoint's names, as `rename` gives them, have before the decoder's own.
    """

    def __init__(self, decoder: Decoder, tower: Tower | None = None, *, prefix: str = "language_model.") -> None:
        super().__init__()
        if tower is not None and tower.levels != decoder.num_feature_levels:
            raise ValueError(
                f"the tower gives {tower.levels} levels of features, and the decoder takes {decoder.num_feature_levels}"
            )
        self.decoder, self.tower, self.prefix = decoder, tower, prefix

    def targets(self) -> dict[str, torch.Tensor | Slot]:
        """Checkpoint names, as `rename` gives them, to what they fill: a tensor, or a slot that takes a part."""
        found: dict[str, torch.Tensor | Slot] = {} if self.tower is None else dict(self.tower.targets())
        return found | {f"{self.prefix}{name}": target for name, target in self.decoder.targets().items()}

    def rename(self, name: str) -> Renamed:
        """A checkpoint's name to the one in `targets`, or to the parts of it that are there; None for a tensor to pass over on
        purpose.

        The names within transformers' models (`model.language_model.`, `lm_head.`), and those of a model that was saved without
        its head (`language_model.layers.`), become those that it saves; a decoder's own (stored_names.py), those of all others.
        """
        name = name.removeprefix("model.")
        if name.startswith(self.prefix):
            own = own_names(self.decoder.config)(name.removeprefix(self.prefix))
            if not isinstance(own, str):
                return [replace(part, name=self.prefix + part.name) for part in own or ()]
            name = self.prefix + own
        if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head.")):
            name = "language_model.model." + name.removeprefix("language_model.")
        elif name.startswith("lm_head."):
            name = "language_model." + name
        is_embedding = self.decoder.lm_head is None and name == "language_model.lm_head.weight"
        return None if is_embedding else name

    def _own(self, name: str) -> Renamed:
        """`rename`, without what other ranks alone have."""
        renamed = self.rename(name)
        if isinstance(renamed, str):
            return None if self._is_elsewhere(renamed) else renamed
        return [part for part in renamed or () if not self._is_elsewhere(part.name)]

    def _is_elsewhere(self, name: str) -> bool:
        return self.decoder.is_elsewhere(name.removeprefix(self.prefix))

    def load(self, folder: Path, progress: Callable[[int, int], None]) -> int:
        """Fill all parameters from `folder`; returns the bytes read. Errors as `load_weights`."""
        shards = read_shards(folder)
        if shards is None:
            num_bytes = load_weights(folder, self.targets(), rename=self._own, progress=progress)
        else:
            parts = {name: slot_of(target).tensor for name, target in self.targets().items()}  # stored as this rank has them
            files = shards.files(folder, self.decoder.split.group.rank)
            num_bytes = load_weights(folder, parts, files=files, progress=progress)
        self.decoder.finish()
        return num_bytes

    def use_stored_formats(self, folder: Path, quantisation: Quantisation | None, dtype: torch.dtype) -> None:
        """Make the decoder's linear layers such as `folder` has them; on the meta device, with all other types settled.

        Raises ValueError for a format that is not supported, FileNotFoundError.
        """
        if read_shards(folder) is not None:
            return  # only dense checkpoints are sharded
        with StoredTensors(folder, self._own) as tensors:
            use_stored_formats(self.decoder, self.prefix, tensors, quantisation, dtype)


def build_decoder(config: Mapping[str, Any], split: Split) -> Decoder:
    """This rank's part of the decoder that `text_config` of a whole config.json describes; raises ValueError naming the key."""
    return make_decoder(read_text_config(config), split)
