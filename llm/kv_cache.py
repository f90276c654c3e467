"""The paged cache's memory by kind of layer: how many bytes a block takes, and the tensors themselves.

Which block belongs to whom is kept in block_pool.py. Shapes: N blocks of S slots, HK KV heads
of this rank, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vlserve.kernels.kv_cache.types import CODE_TYPES, SCALE_TYPE, Blocks, QuantizedBlocks
from vlserve.kernels.upload import upload


class CacheKind(ABC):
    """What a kind of layers keeps of a block of tokens, on one rank. Kinds that are equal keep the same."""

    @abstractmethod
    def block_bytes(self, block_size: int, dtype: torch.dtype, kv_dtype: str) -> int:
        """Of one block in one layer; `kv_dtype`: the option of the KV cache, auto, int8 or fp8."""

    @abstractmethod
    def make(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, kv_dtype: str, device: torch.device
    ) -> tuple[Blocks, ...]:
        """One layer's cache, as its mixer takes it; the first dimension of each tensor is the block's number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysAndValues(CacheKind):
    """A key and a value of each token for each of this rank's KV heads."""

    num_kv_heads: int
    head_dim: int

    def block_bytes(self, block_size: int, dtype: torch.dtype, kv_dtype: str) -> int:
        """int8 and fp8 have a scale a token and head."""
        per_head = self.head_dim * dtype.itemsize
        if kv_dtype != "auto":
            per_head = self.head_dim * CODE_TYPES[kv_dtype].itemsize + SCALE_TYPE.itemsize
        return 2 * self.num_kv_heads * block_size * per_head

    def make(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, kv_dtype: str, device: torch.device
    ) -> tuple[Blocks, ...]:
        """(keys, values), each [N, S, HK, D], of `dtype` or quantised."""
        shape = (num_blocks, block_size, self.num_kv_heads, self.head_dim)

        def blocks() -> Blocks:
            # untouched pages of torch.empty take no memory on the CPU until a block is first used
            if kv_dtype == "auto":
                return torch.empty(shape, dtype=dtype, device=device)
            codes = torch.empty(shape, dtype=CODE_TYPES[kv_dtype], device=device)
            return QuantizedBlocks(codes, torch.empty(shape[:-1], dtype=SCALE_TYPE, device=device))

        return blocks(), blocks()


def block_bytes(kinds: Iterable[CacheKind], block_size: int, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
    """Bytes of one block over all layers, whose kinds are given.

    Args:
        dtype: the computation type, also of what is kept with `kv_dtype` auto.
    """
    return sum(kind.block_bytes(block_size, dtype, kv_dtype) for kind in kinds)


class KVCache:
    """A block has the same number, and the same tokens, in every layer; each layer keeps what its kind says.

    `layers[i]` is the cache of layer i. `serves`: the layers of each kind.
    """

    def __init__(
        self,
        kinds: Sequence[CacheKind],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: str = "auto",
    ) -> None:
        self.block_size = block_size
        self.serves = {kind: [i for i, own in enumerate(kinds) if own == kind] for kind in dict.fromkeys(kinds)}
        self.layers = [kind.make(num_blocks, block_size, dtype, kv_dtype, device) for kind in kinds]
        self._tensors = [
            tensor
            for layer in self.layers
            for blocks in layer
            for tensor in ((blocks.codes, blocks.scales) if isinstance(blocks, QuantizedBlocks) else (blocks,))
        ]

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that will be filled in part: attention masks their other slots, but 0 * NaN is NaN."""
        if not blocks:
            return
        index = upload(blocks, torch.int64, self._tensors[0].device)
        for tensor in self._tensors:
            tensor.index_fill_(0, index, 0)
