"""A decoder that varies ours, added through the tables alone: Granite, the Llama shape with four multipliers.

Source: transformers' `GraniteForCausalLM`; within InternVL transformers does not divide by `logits_scaling`, so it stays at 1 in
the test. Shapes: T tokens, C hidden size, R rows to sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from vlserve.llm import config_readers, decoders
from vlserve.llm.attention import Attention
from vlserve.llm.config import DecoderConfig
from vlserve.llm.decoder import Decoder
from vlserve.llm.layer import LayerKind
from vlserve.llm.mlp import DenseMLP
from vlserve.llm.tensor_parallel import Split

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraniteConfig(DecoderConfig):
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_scaling: float


def read_granite(text: Mapping[str, Any]) -> GraniteConfig:
    llama = config_readers.read_llama(text)
    shape = {field.name: getattr(llama, field.name) for field in fields(llama)}
    return GraniteConfig(**shape, **{key: float(text.get(key, 1.0)) for key in MULTIPLIERS})


class GraniteAttention(Attention):
    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__(config, split)
        assert isinstance(config, GraniteConfig)
        self.scale, self.multiplier = config.attention_multiplier, config.residual_multiplier

    def forward(self, *arguments: Any) -> torch.Tensor:
        return super().forward(*arguments) * self.multiplier


class GraniteMLP(DenseMLP):
    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__(config, split)
        assert isinstance(config, GraniteConfig)
        self.multiplier = config.residual_multiplier

    def forward(self, *arguments: Any) -> torch.Tensor:
        return super().forward(*arguments) * self.multiplier


class Granite(Decoder):
    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__(config, split, {"full_attention": LayerKind(GraniteAttention, GraniteMLP)})
        assert isinstance(config, GraniteConfig)
        self.multiplier, self.divisor = config.embedding_multiplier, config.logits_scaling

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.multiplier

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        logits = super().logits(hidden)
        return None if logits is None else logits / self.divisor


def add_granite(patch: pytest.MonkeyPatch) -> None:
    """The two lines that a built-in one would be."""
    patch.setitem(config_readers.READERS, "granite", read_granite)  # type: ignore[misc]
    patch.setitem(decoders.DECODERS, "granite", Granite)  # type: ignore[misc]
