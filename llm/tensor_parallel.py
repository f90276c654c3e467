"""Tensor parallelism as the layers see it: which span of a weight a rank owns, and the group it adds results up with.

How ranks find and reach one another is the engine's business; a `Group` of one does nothing and costs nothing.
Source of the scheme: Megatron-LM (arXiv 1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Span:
    """Places start..stop of a checkpoint's dimension, kept at 0.. of `size` places; those beyond are zero."""

    start: int
    stop: int
    size: int


class Group:
    """A rank's view of the ranks that share a model; this class is the group of one."""

    rank, size = 0, 1
    seconds = 0.0  # spent in collectives, but for those in a CUDA graph

    @property
    def can_record(self) -> bool:
        """Whether collectives may be part of a CUDA graph."""
        return True

    def all_reduce(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """The sum of every rank's x, in place. `kind` names the use, for counts and messages."""
        return x

    def gather(self, x: torch.Tensor, kind: str) -> torch.Tensor | None:
        """x [R, V] of every rank, side by side, [R, size * V] on rank 0 and None on the others."""
        return x

    def all_gather(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """x [...] of every rank, [size, ...]."""
        return x.unsqueeze(0)

    def broadcast(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """Rank 0's x, in place."""
        return x


ALONE = Group()


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a rank's part of the language model is cut. Raises ValueError where the heads do not divide.

    Args:
        group: the ranks. replicate_kv_heads: with more ranks than KV heads, each keeps one, and several the same.
        expert_parallel: a rank has some of a layer's experts whole, where it would have a part of every one.
    """

    group: Group = ALONE
    replicate_kv_heads: bool = False
    expert_parallel: bool = False

    def whole(self, size: int) -> Span:
        return Span(0, size, size)

    def padded(self, size: int) -> Span:
        """An equal share for every rank, the last ones with zeros where `size` does not divide."""
        share = -(-size // self.group.size)
        start = min(self.group.rank * share, size)
        return Span(start, min(start + share, size), share)

    def experts(self, number: int) -> Span:
        """Of a layer's `number` experts, those of which this rank has something; shares differ by one where they must."""
        if not self.expert_parallel:
            return self.whole(number)
        rank, size = self.group.rank, self.group.size
        if number < size:
            raise ValueError(f"num_experts {number} is less than tp {size}: with expert_parallel each rank has one or more")
        start, stop = rank * number // size, (rank + 1) * number // size
        return Span(start, stop, stop - start)

    def expert_width(self, width: int) -> Span:
        """This rank's part of the width of each of its experts."""
        return self.whole(width) if self.expert_parallel else self.padded(width)

    def query_heads(self, num_heads: int, head_dim: int) -> Span:
        return self._heads(self.group.rank, num_heads, self.group.size, head_dim, "num_attention_heads")

    def kv_heads(self, num_heads: int, head_dim: int) -> Span:
        """Of rank r with fewer heads than ranks: the one that its query heads attend with."""
        size = self.group.size
        if self.replicate_kv_heads and size > num_heads and size % num_heads == 0:
            return self._heads(self.group.rank // (size // num_heads), num_heads, num_heads, head_dim, "num_key_value_heads")
        return self._heads(self.group.rank, num_heads, size, head_dim, "num_key_value_heads")

    def _heads(self, place: int, num_heads: int, shares: int, head_dim: int, key: str) -> Span:
        if num_heads % shares:
            raise ValueError(f"{key} {num_heads} is not divisible by tp {self.group.size}")
        share = num_heads // shares * head_dim
        return Span(place * share, (place + 1) * share, share)
