"""The paged KV cache's memory: how many bytes a block takes, and the tensors themselves.

Which block belongs to whom is `block_pool`'s business. Shapes: N blocks of S slots, HK KV heads
of this rank, D head_dim.
"""

from __future__ import annotations

import torch

from vlserve.llm.config import DecoderConfig


def block_bytes(config: DecoderConfig, num_kv_heads: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values, with this rank's `num_kv_heads`."""
    per_token = 2 * config.num_hidden_layers * num_kv_heads * config.head_dim
    return per_token * block_size * dtype.itemsize


class KVCache:
    """Keys and values of every layer; `layers[i]` is (keys, values), each [N, S, HK, D]."""

    def __init__(
        self,
        config: DecoderConfig,
        num_kv_heads: int,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, num_kv_heads, config.head_dim)
        # untouched pages of torch.empty take no memory on the CPU until a block is first used
        self.layers = [
            (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that will be filled in part: attention masks their other slots, but 0 * NaN is NaN."""
        if not blocks:
            return
        index = torch.tensor(blocks, device=self.layers[0][0].device)
        for keys, values in self.layers:
            keys.index_fill_(0, index, 0)
            values.index_fill_(0, index, 0)
