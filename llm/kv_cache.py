"""The paged KV cache's memory: how many bytes a block takes, and the tensors themselves.

Which block belongs to whom is kept in block_pool.py. Shapes: N blocks of S slots, HK KV heads
of this rank, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vlserve.kernels.kv_cache.types import CODE_TYPES, SCALE_TYPE, Blocks, QuantizedBlocks
from vlserve.kernels.upload import upload


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKind:
    """What a kind of layers keeps of a token, on one rank: a key and a value for each of its KV heads."""

    num_kv_heads: int
    head_dim: int

    def block_bytes(self, block_size: int, dtype: torch.dtype, kv_dtype: str) -> int:
        """Of one layer. int8 and fp8 have a scale a token and head."""
        per_head = self.head_dim * dtype.itemsize
        if kv_dtype != "auto":
            per_head = self.head_dim * CODE_TYPES[kv_dtype].itemsize + SCALE_TYPE.itemsize
        return 2 * self.num_kv_heads * block_size * per_head

    def make(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, kv_dtype: str, device: torch.device
    ) -> tuple[Blocks, Blocks]:
        """(keys, values) of one layer, each [N, S, HK, D], of `dtype` or quantised."""
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

    `layers[i]` is (keys, values) of layer i. `serves`: the layers of each kind.
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
