"""One decoder for the Llama shape and its variations (Llama, Mistral, Qwen2, Qwen3).

Embeddings in, hidden states out; logits are taken for the rows that need them. Sampling, requests and
pictures are others' business. Shapes: T tokens, C hidden size, V vocabulary, R rows to sample.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from vlserve.kernels.attention.types import AttentionMetadata
from vlserve.kernels.gate import silu_mul
from vlserve.kernels.kv_cache.types import Blocks
from vlserve.kernels.norms import add_rms_norm, rms_norm
from vlserve.kernels.rotary.table import rotary_table
from vlserve.llm.attention import Attention
from vlserve.llm.config import DecoderConfig
from vlserve.llm.embedding import VocabParallel
from vlserve.llm.formats import Slot
from vlserve.llm.kv_cache import KVCache
from vlserve.llm.linear import ColumnParallelLinear, Linear, RowParallelLinear
from vlserve.llm.parallel import Split

LAYERS = "model.layers."


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.self_attn = Attention(config, split)
        self.post_attention_layernorm = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        width, span = config.intermediate_size, split.padded(config.intermediate_size)
        outputs = {"gate_proj": (span, width), "up_proj": (span, width)}
        self.gate_up_proj = ColumnParallelLinear(config.hidden_size, outputs, bias=config.mlp_bias)
        self.down_proj = RowParallelLinear("down_proj", span, width, config.hidden_size, bias=config.mlp_bias, group=split.group)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[Blocks, Blocks],
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, residual), both [T, C]; their sum is the layer's result, taken by the next norm.

        What makes a projection's inputs writes the sums that the projection's format takes beside them.
        """
        sums = self.self_attn.qkv_proj.format.empty_sums(x)
        if residual is None:
            x, residual = rms_norm(x, self.input_layernorm, self.eps, sums), x
        else:
            x, residual = add_rms_norm(x, residual, self.input_layernorm, self.eps, sums)
        x = self.self_attn(x, sums, cos_sin, cache, metadata)
        sums = self.gate_up_proj.format.empty_sums(x)
        x, residual = add_rms_norm(x, residual, self.post_attention_layernorm, self.eps, sums)
        gate_up = self.gate_up_proj(x, sums)
        sums = self.down_proj.format.empty_sums(gate_up)
        return self.down_proj(silu_mul(gate_up, sums), sums), residual

    def linears(self, prefix: str) -> Iterator[tuple[str, Linear]]:
        """(what a checkpoint has before the projections' names, layer) of each linear layer."""
        yield f"{prefix}self_attn.", self.self_attn.qkv_proj
        yield f"{prefix}self_attn.", self.self_attn.o_proj
        yield f"{prefix}mlp.", self.gate_up_proj
        yield f"{prefix}mlp.", self.down_proj

    def targets(self, prefix: str) -> Iterator[tuple[str, torch.Tensor | Slot]]:
        for names, linear in self.linears(prefix):
            yield from linear.targets(names)
        attention = self.self_attn
        norms = {
            "input_layernorm": self.input_layernorm,
            "post_attention_layernorm": self.post_attention_layernorm,
            "self_attn.q_norm": attention.q_norm,
            "self_attn.k_norm": attention.k_norm,
        }
        for name, norm in norms.items():
            if norm is not None:
                yield f"{prefix}{name}.weight", norm.data


class Decoder(nn.Module):
    """This rank's part of the decoder; `split` says which."""

    def __init__(self, config: DecoderConfig, split: Split) -> None:
        super().__init__()
        self.config, self.split = config, split
        self.embed_tokens = VocabParallel(config.vocab_size, config.hidden_size, split)
        self.layers = nn.ModuleList(DecoderLayer(config, split) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.empty(config.hidden_size), requires_grad=False)
        self.lm_head = None if config.tie_word_embeddings else VocabParallel(config.vocab_size, config.hidden_size, split)
        self.rotary: torch.Tensor | None = None

    def prepare(self, max_model_len: int, device: torch.device) -> None:
        """Compute cos and sin for positions 0..max_model_len-1, once, in float32."""
        self.rotary = rotary_table(self.config.rope, max_model_len).to(device)

    @property
    def num_query_heads(self) -> int:
        """Of this rank."""
        return self.split.query_heads(self.config.num_attention_heads, 1).size

    @property
    def num_kv_heads(self) -> int:
        """Of this rank."""
        kv = self.split.kv_heads(self.config.num_key_value_heads, self.config.head_dim)
        return kv.size // self.config.head_dim

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T] int64 -> [T, C]."""
        return self.embed_tokens.embed(ids)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, cache: KVCache, metadata: AttentionMetadata) -> torch.Tensor:
        """x [T, C], positions [T] int64 -> hidden states [T, C], normed."""
        assert self.rotary is not None, "prepare() comes before forward()"
        cos, sin = self.rotary[positions].unbind(1)
        residual = None
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x, residual = layer(x, residual, (cos, sin), layer_cache, metadata)
        assert residual is not None
        return add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)[0]

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
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            found.update(layer.targets(f"{LAYERS}{i}."))
        return found

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """(what a checkpoint has before the projections' names, layer) of each linear layer."""
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.linears(f"{LAYERS}{i}.")

    def finish(self) -> None:
        """Called once, when all weights are there and before the first use."""
        for _, linear in self.linears():
            linear.format.finish()
