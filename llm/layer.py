"""A decoder layer of any kind: a mixer, in which tokens see one another, and a feed-forward half, with a norm before each.

A kind names the two; a new one is a new file with a `Mixer` or a `FeedForward`, and a line in layer_kinds.py or in another table.
Shapes: T tokens, C hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache.types import Blocks
from vlserve.kernels.norms import add_rms_norm, rms_norm
from vlserve.llm.config import DecoderConfig
from vlserve.llm.formats import Slot
from vlserve.llm.kv_cache import CacheKind
from vlserve.llm.linear import Linear
from vlserve.llm.tensor_parallel import Split


class Half(nn.Module, ABC):
    """What both halves of a layer have: linear layers, and room for the sums that the first of them takes beside its inputs."""

    @abstractmethod
    def empty_sums(self, x: torch.Tensor) -> torch.Tensor | None:
        """Room for the group sums of inputs x, which the norm in front writes; None where none are taken."""

    @abstractmethod
    def linears(self) -> Iterator[tuple[str, Linear]]:
        """(what a checkpoint has before the projections' names within the layer, layer) of each linear layer."""

    def others(self) -> Iterator[tuple[str, torch.Tensor | Slot]]:
        """(name within the layer, what it fills) of all other tensors."""
        return iter(())

    def finish(self) -> None:
        """Called once, when all weights are there and before the first use."""
        for _, linear in self.linears():
            linear.format.finish()


class Mixer(Half):
    """Attention or what stands for it, with a cache of its own."""

    cache_kind: CacheKind  # of this rank
    can_record: bool = True  # in a CUDA graph: a decode step is then told by tensors alone, and `metadata` has no lengths

    @abstractmethod
    def forward(
        self,
        x: torch.Tensor,
        sums: torch.Tensor | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[Blocks, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """x [T, C], with the sums that it takes -> [T, C]; writes to this layer's cache what later steps read of the tokens."""


class FeedForward(Half):
    """What is computed of each token by itself."""

    @abstractmethod
    def forward(self, x: torch.Tensor, sums: torch.Tensor | None) -> torch.Tensor:
        """x [T, C], with the sums that it takes -> [T, C]."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    mixer: Callable[[DecoderConfig, Split], Mixer]
    feed_forward: Callable[[DecoderConfig, Split], FeedForward]


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, split: Split, kind: LayerKind) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.mixer = kind.mixer(config, split)
        self.post_attention_layernorm = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.feed_forward = kind.feed_forward(config, split)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[Blocks, ...],
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, residual), both [T, C]; their sum is the layer's result, taken by the next norm.

        What makes a projection's inputs writes the sums that the projection's format takes beside them.
        """
        sums = self.mixer.empty_sums(x)
        if residual is None:
            x, residual = rms_norm(x, self.input_layernorm, self.eps, sums), x
        else:
            x, residual = add_rms_norm(x, residual, self.input_layernorm, self.eps, sums)
        x = self.mixer(x, sums, cos_sin, cache, metadata)
        sums = self.feed_forward.empty_sums(x)
        x, residual = add_rms_norm(x, residual, self.post_attention_layernorm, self.eps, sums)
        return self.feed_forward(x, sums), residual

    def linears(self, prefix: str) -> Iterator[tuple[str, Linear]]:
        """(what a checkpoint has before the projections' names, layer) of each linear layer."""
        for names, linear in chain(self.mixer.linears(), self.feed_forward.linears()):
            yield f"{prefix}{names}", linear

    def targets(self, prefix: str) -> Iterator[tuple[str, torch.Tensor | Slot]]:
        for names, linear in self.linears(prefix):
            yield from linear.targets(names)
        yield f"{prefix}input_layernorm.weight", self.input_layernorm.data
        yield f"{prefix}post_attention_layernorm.weight", self.post_attention_layernorm.data
        for name, target in chain(self.mixer.others(), self.feed_forward.others()):
            yield f"{prefix}{name}", target
