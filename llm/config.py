"""The decoder's shape, as all its parts take it. What config.json says of it is read in config_readers.py. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from vlserve.kernels.rope import RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as transformers names them


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """Mixtures of experts that some layers have for their MLP: a router gives each token `top_k` experts, and each of these a
    weight."""

    layers: tuple[int, ...]  # that have experts
    num_experts: int
    top_k: int
    width: int  # of an expert
    norm_topk_prob: bool  # a token's weights are softmax over its own experts, and not over all
    router_bias: bool = False
    bias: bool = False  # of each expert's projections
    activation: str = "silu"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """One shape with its variations; field names are the checkpoint's where it has them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # per head, as Qwen3
    rope: RopeConfig
    layer_types: tuple[str, ...]  # a kind for each layer
    experts: ExpertsConfig | None = None
    sliding_window: int | None = None  # tokens that a layer with a window sees
    mrope_axes: tuple[int, ...] = ()  # of each frequency: the axis of positions that it turns by; () for one axis
    deep_layers: tuple[int, ...] = ()  # after which the second, third, ... level of a picture's features is added

    @property
    def num_position_axes(self) -> int:
        return max(self.mrope_axes, default=0) + 1

    @property
    def longest_context(self) -> int:
        """The most tokens that `max_model_len` may be: what the rotary scaling reaches."""
        return max(self.max_position_embeddings, self.rope.reach)

    @property
    def limit_text(self) -> str:
        """`longest_context` and where it comes from."""
        rope = self.rope
        if rope.reach > self.max_position_embeddings:
            return f"{rope.reach} ({rope.original_max_positions} x factor {rope.factor:g})"
        return f"{self.max_position_embeddings} (max_position_embeddings)"

    @property
    def default_context(self) -> int:
        """Tokens where no `max_model_len` is given. Dynamic scaling does nothing up to `max_position_embeddings`, and beyond it
        the frequencies are other ones, for short texts too; so it is not taken unasked."""
        return self.max_position_embeddings if self.rope.rope_type == "dynamic" else self.longest_context
