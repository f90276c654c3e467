"""The kinds of layers that decoders here are made of, by the names that config.json's `layer_types` has."""

from __future__ import annotations

from collections.abc import Mapping

from vlserve.llm.attention import Attention
from vlserve.llm.layer import LayerKind
from vlserve.llm.mlp import DenseMLP
from vlserve.llm.sliding_attention import SlidingAttention

LAYER_KINDS: Mapping[str, LayerKind] = {
    "full_attention": LayerKind(Attention, DenseMLP),
    "sliding_attention": LayerKind(SlidingAttention, DenseMLP),
}
