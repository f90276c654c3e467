"""Which class computes a decoder, by its `model_type`; `Decoder` where no other is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlserve.llm.config import DecoderConfig
from vlserve.llm.decoder import Decoder
from vlserve.llm.tensor_parallel import Split

DECODERS: Mapping[str, Callable[[DecoderConfig, Split], Decoder]] = {}


def make_decoder(config: DecoderConfig, split: Split) -> Decoder:
    """This rank's part, on the device that torch makes tensors on."""
    return DECODERS.get(config.model_type, Decoder)(config, split)
