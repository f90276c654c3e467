"""The decoder's shape, read from a Hugging Face text config; refuses what the decoder cannot do.

Raises ValueError with the offending key; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlserve.kernels.rope import RopeConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_OPTIONAL_ROPE_KEYS = (
    *("low_freq_factor", "high_freq_factor"),  # llama3
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),  # yarn
)


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


def read_decoder_config(text: Mapping[str, Any]) -> DecoderConfig:
    """Read `text_config`; raises ValueError naming the key that is missing or not supported."""
    model_type = text.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"text_config.model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    _refuse_sliding_window(text)
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"text_config.hidden_act {text['hidden_act']!r} is not supported; supported: silu")
    heads = _integer(text, "num_attention_heads")
    kv_heads = _integer(text, "num_key_value_heads") if text.get("num_key_value_heads") is not None else heads
    if heads % kv_heads:
        raise ValueError(f"text_config.num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    hidden = _integer(text, "hidden_size")
    head_dim = _integer(text, "head_dim") if text.get("head_dim") is not None else hidden // heads
    bias = bool(text.get("attention_bias", False))
    max_positions = _integer(text, "max_position_embeddings")
    return DecoderConfig(
        model_type=model_type,
        vocab_size=_integer(text, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(text, "intermediate_size"),
        num_hidden_layers=_integer(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2" or bias,
        output_bias=bias and model_type in ("llama", "qwen3"),
        mlp_bias=bool(text.get("mlp_bias", False)) and model_type == "llama",
        qk_norm=model_type == "qwen3",
        rope=_read_rope(text, head_dim, max_positions),
    )


def _integer(text: Mapping[str, Any], key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"text_config.{key} is {value!r}; expected a positive integer")
    return value


def _refuse_sliding_window(text: Mapping[str, Any]) -> None:
    window = text.get("sliding_window")
    used = window is not None and (text["model_type"] == "mistral" or text.get("use_sliding_window", False))
    if used or "sliding_attention" in (text.get("layer_types") or ()):
        raise ValueError(
            f"text_config.sliding_window {window!r} is not supported: attention here covers the whole context. "
            "Use a checkpoint with full attention (sliding_window: null)"
        )


def _read_rope(text: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    given = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope_type = str(given.get("rope_type") or given.get("type") or "default")
    partial = given.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"text_config partial_rotary_factor {partial} is not supported; supported: 1")
    optional = {key: given[key] for key in _OPTIONAL_ROPE_KEYS if given.get(key) is not None}
    return RopeConfig(
        head_dim=head_dim,
        theta=float(given.get("rope_theta", text.get("rope_theta", 10000.0))),
        rope_type=rope_type,
        factor=float(given.get("factor", 1.0)),
        original_max_positions=int(given.get("original_max_position_embeddings") or max_positions),
        **optional,
    )
