"""Full self-attention of one decoder layer. Shapes: T tokens, HQ and HK heads, D head_dim, C hidden size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vlserve.kernels.attention import paged_attention
from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.kv_cache.types import Blocks
from vlserve.kernels.rotary import rotary_store
from vlserve.llm.config import DecoderConfig
from vlserve.llm.formats import Slot
from vlserve.llm.kv_cache import KeysAndValues
from vlserve.llm.layer import Mixer
from vlserve.llm.linear import ColumnParallelLinear, Linear, RowParallelLinear
from vlserve.llm.tensor_parallel import Split


class Attention(Mixer):
    """This rank's heads; the output projection's sum brings every rank the whole result."""

    window: int | None = None  # tokens that a token sees, itself counted; None: all before it

    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__()
        dim = self.head_dim = config.head_dim
        query = split.query_heads(config.num_attention_heads, dim)
        kv, kv_size = split.kv_heads(config.num_key_value_heads, dim), config.num_key_value_heads * dim
        query_size = config.num_attention_heads * dim
        self.cache_kind = KeysAndValues(num_kv_heads=kv.size // dim, head_dim=dim)
        self.sizes = [query.size, kv.size, kv.size]
        outputs = {"q_proj": (query, query_size), "k_proj": (kv, kv_size), "v_proj": (kv, kv_size)}
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, outputs, bias=config.qkv_bias)
        self.o_proj = RowParallelLinear(
            "o_proj", query, query_size, config.hidden_size, bias=config.output_bias, group=split.group
        )
        self.eps, self.scale = config.rms_norm_eps, config.head_dim**-0.5
        self.q_norm = nn.Parameter(torch.empty(config.head_dim), requires_grad=False) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(config.head_dim), requires_grad=False) if config.qk_norm else None
        self.heads, self.num_heads = split.query_heads(config.num_attention_heads, 1), config.num_attention_heads
        self.sinks = nn.Parameter(torch.empty(self.heads.size), requires_grad=False) if config.attention_sinks else None

    def forward(
        self,
        x: torch.Tensor,
        sums: torch.Tensor | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[Blocks, ...],
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """x [T, C], with the sums that qkv_proj takes -> [T, C]; writes this step's keys and values to the cache."""
        projected = self.qkv_proj(x, sums).split(self.sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)
        keys, values = cache
        query = rotary_store(query, key, value, cos_sin, (keys, values), metadata.slots, norms, self.eps)
        out = paged_attention(query, keys, values, metadata, self.scale, window=self.window, sinks=self.sinks)
        return self.o_proj(out.flatten(1))

    def empty_sums(self, x: torch.Tensor) -> torch.Tensor | None:
        return self.qkv_proj.format.empty_sums(x)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        yield "self_attn.", self.qkv_proj
        yield "self_attn.", self.o_proj

    def others(self) -> Iterator[tuple[str, torch.Tensor | Slot]]:
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if norm is not None:
                yield f"self_attn.{name}.weight", norm.data
        if self.sinks is not None:
            yield "self_attn.sinks", Slot(self.sinks.data, (self.num_heads,), {0: self.heads})

    def finish(self) -> None:
        super().finish()
        if self.sinks is not None:
            self.sinks.data = self.sinks.data.float()  # as scores are
