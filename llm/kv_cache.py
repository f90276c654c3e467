"""The paged KV cache's memory: how many bytes a block takes, and the tensors themselves.

Which block belongs to whom is `block_pool`'s business. Shapes: N blocks of S slots, HK KV heads
of this rank, D head_dim.
"""

from __future__ import annotations

import torch

from vlserve.kernels.kv_cache.types import CODE_TYPES, SCALE_TYPE, Blocks, QuantizedBlocks
from vlserve.kernels.upload import upload
from vlserve.llm.config import DecoderConfig


def block_bytes(config: DecoderConfig, num_kv_heads: int, block_size: int, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
    """Bytes of one block over all layers, keys and values with their scales, with this rank's `num_kv_heads`.

    Args:
        dtype: the computation type, also of keys and values with `kv_dtype` auto; int8 and fp8 have a scale a token and head.
    """
    per_head = config.head_dim * dtype.itemsize
    if kv_dtype != "auto":
        per_head = config.head_dim * CODE_TYPES[kv_dtype].itemsize + SCALE_TYPE.itemsize
    return 2 * config.num_hidden_layers * num_kv_heads * block_size * per_head


class KVCache:
    """Keys and values of every layer; `layers[i]` is (keys, values), each [N, S, HK, D], of `dtype` or quantised."""

    def __init__(
        self,
        config: DecoderConfig,
        num_kv_heads: int,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: str = "auto",
    ) -> None:
        self.block_size = block_size
        shape = (num_blocks, block_size, num_kv_heads, config.head_dim)

        def make() -> Blocks:
            # untouched pages of torch.empty take no memory on the CPU until a block is first used
            if kv_dtype == "auto":
                return torch.empty(shape, dtype=dtype, device=device)
            codes = torch.empty(shape, dtype=CODE_TYPES[kv_dtype], device=device)
            return QuantizedBlocks(codes, torch.empty(shape[:-1], dtype=SCALE_TYPE, device=device))

        self.layers = [(make(), make()) for _ in range(config.num_hidden_layers)]
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
