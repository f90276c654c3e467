"""One decoder for the Llama shape and its variations (Llama, Mistral, Qwen2, Qwen3), a list of layers of any kinds.

Embeddings in, hidden states out; logits are taken for the rows that need them. Sampling, requests and
pictures are others' business. Shapes: T tokens, A axes of a position, C hidden size, D head_dim, F features, V vocabulary,
R rows to sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.norms import add_rms_norm
from vlserve.kernels.rotary.table import rotary_table
from vlserve.llm.config import DecoderConfig
from vlserve.llm.embedding import VocabParallel
from vlserve.llm.experts import Experts
from vlserve.llm.formats import Slot
from vlserve.llm.kv_cache import CacheKind, KVCache
from vlserve.llm.layer import DecoderLayer, LayerKind
from vlserve.llm.layer_kinds import LAYER_KINDS
from vlserve.llm.linear import Linear
from vlserve.llm.tensor_parallel import Split

LAYERS = "model.layers."


@dataclass(frozen=True, slots=True)
class DeepFeatures:
    """What deeper layers take of a step's pictures: rows [F] int64, and what each of `deep_layers` adds to them, [F, C]."""

    rows: torch.Tensor
    levels: Sequence[torch.Tensor]


class Decoder(nn.Module):
    """This rank's part of the decoder; `split` says which. `kinds`: of layers, by the names in the config's `layer_types`."""

    def __init__(self, config: DecoderConfig, split: Split, kinds: Mapping[str, LayerKind] = LAYER_KINDS) -> None:
        super().__init__()
        unknown = sorted(set(config.layer_types) - set(kinds))
        if unknown:
            raise ValueError(f"layer_types has {', '.join(unknown)}; this decoder has {', '.join(kinds)}")
        self.config, self.split, self.kinds = config, split, kinds
        self.embed_tokens = VocabParallel(config.vocab_size, config.hidden_size, split)
        self.layers = nn.ModuleList(DecoderLayer(config, split, self.layer_kind(i)) for i in range(len(config.layer_types)))
        self.norm = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.lm_head = None if config.tie_word_embeddings else VocabParallel(config.vocab_size, config.hidden_size, split)
        self.rotary: torch.Tensor | None = None

    def layer_kind(self, index: int) -> LayerKind:
        """What `layer_types` names, with experts where the config has them."""
        kind, experts = self.kinds[self.config.layer_types[index]], self.config.experts
        return kind if experts is None or index not in experts.layers else replace(kind, feed_forward=Experts)

    def prepare(self, max_model_len: int, device: torch.device) -> None:
        """Compute cos and sin for positions 0..max_model_len-1, once, in float32."""
        self.rotary = rotary_table(self.config.rope, max_model_len).to(device)
        if self.config.mrope_axes:
            self._axis_of = torch.tensor(self.config.mrope_axes, device=device)
            self._frequencies = torch.arange(len(self.config.mrope_axes), device=device)

    @property
    def num_position_axes(self) -> int:
        """Numbers that a token's position has."""
        return self.config.num_position_axes

    @property
    def num_feature_levels(self) -> int:
        """Levels that a picture's features have: the embeddings', and one for each layer that takes its own."""
        return 1 + len(self.config.deep_layers)

    @property
    def num_query_heads(self) -> int:
        """Of this rank."""
        return self.split.query_heads(self.config.num_attention_heads, 1).size

    @property
    def cache_kinds(self) -> list[CacheKind]:
        """Of each layer, on this rank."""
        return [layer.mixer.cache_kind for layer in self.decoder_layers]

    @property
    def can_record(self) -> bool:
        """Whether decode steps may be CUDA graphs."""
        return all(layer.mixer.can_record for layer in self.decoder_layers)

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """`layers`, with their type."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T] int64 -> [T, C]; pictures' features then take the places of their rows, before `forward`."""
        return self.embed_tokens.embed(ids)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        metadata: AttentionMetadata,
        deep: DeepFeatures | None = None,
    ) -> torch.Tensor:
        """x [T, C] with pictures' features in place, positions [A, T] int64, or [T] -> hidden states [T, C], normed."""
        cos_sin = self._cos_sin(positions.view(self.num_position_axes, len(x)))
        x, residual = self.enter(x), None
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x, residual = layer(x, residual, cos_sin, layer_cache, metadata)
            if deep is not None and index in self.config.deep_layers:
                residual.index_add_(0, deep.rows, deep.levels[self.config.deep_layers.index(index)])
        assert residual is not None
        return self.leave(x, residual)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """What the first layer reads of x [T, C]."""
        return x

    def leave(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """From the last layer's result and residual [T, C] to what `logits` takes."""
        return add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)[0]

    def _cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [A, T] -> [T, D/2] each; with several axes, every frequency turns by the position on its own."""
        assert self.rotary is not None, "prepare() comes before forward()"
        if len(positions) == 1:
            cos, sin = self.rotary[positions[0]].unbind(1)
            return cos, sin
        turned = self.rotary[positions][self._axis_of, :, :, self._frequencies]  # [D/2, T, 2]
        cos, sin = turned.permute(2, 1, 0).contiguous().unbind(0)
        return cos, sin

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [R, C] -> float32 logits [R, V] on rank 0, None on the others."""
        return (self.lm_head or self.embed_tokens).logits(hidden)

    def quantise_head(self) -> None:
        """Once the weights are there: the head in 8 bits, beside the embedding where that is the same table."""
        if self.lm_head is None:
            self.embed_tokens.quantise_head(embeds=True)
        else:
            self.lm_head.quantise_head(embeds=False)

    def targets(self) -> dict[str, torch.Tensor | Slot]:
        """Checkpoint names as in a causal language model of transformers: `model.layers.0...`, `lm_head.weight`."""
        found: dict[str, torch.Tensor | Slot] = {
            "model.embed_tokens.weight": self.embed_tokens.target(),
            "model.norm.weight": self.norm.data,
        }
        if self.lm_head is not None:
            found["lm_head.weight"] = self.lm_head.target()
        for i, layer in enumerate(self.decoder_layers):
            found.update(layer.targets(f"{LAYERS}{i}."))
        return found

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """(what a checkpoint has before the projections' names, layer) of each linear layer; experts have some until `finish`."""
        for i, layer in enumerate(self.decoder_layers):
            yield from layer.linears(f"{LAYERS}{i}.")

    def is_elsewhere(self, name: str) -> bool:
        """Whether a checkpoint's tensor is of an expert that other ranks have; `name` as in `targets`."""
        match = re.match(rf"{re.escape(LAYERS)}(\d+)\.mlp\.experts\.(\d+)\.", name)
        layers = self.decoder_layers
        if match is None or int(match[1]) >= len(layers):
            return False
        experts = layers[int(match[1])].feed_forward
        return isinstance(experts, Experts) and experts.is_elsewhere(int(match[2]))

    def finish(self) -> None:
        """Called once, when all weights are there and before the first use."""
        for layer in self.decoder_layers:
            layer.mixer.finish()
            layer.feed_forward.finish()
