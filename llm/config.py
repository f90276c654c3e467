"""The decoder's shape, read from a Hugging Face text config; refuses what the decoder cannot do.

Raises ValueError with the offending key; knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlserve.kernels.rope import RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"  # layer_types, as transformers has them
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
    layer_types: tuple[str, ...]  # a kind for each layer
    sliding_window: int | None = None  # tokens that a layer with a window sees
    mrope_axes: tuple[int, ...] = ()  # of each frequency: the axis of positions that it turns by; () for one axis
    deep_layers: tuple[int, ...] = ()  # after which the second, third, ... level of a picture's features is added

    @property
    def num_position_axes(self) -> int:
        return max(self.mrope_axes, default=0) + 1


def read_text_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the `text_config` of a whole config.json; raises ValueError as `read_decoder_config`."""
    text = dict(config.get("text_config") or {})
    # transformers ties the head when either the outer or the text config says so
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    return read_decoder_config(text)


def read_decoder_config(text: Mapping[str, Any]) -> DecoderConfig:
    """Read `text_config`; raises ValueError naming the key that is missing or not supported."""
    model_type = text.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"text_config.model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
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
    layer_types, window = _read_layer_types(text)
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
        layer_types=layer_types,
        sliding_window=window,
    )


def _integer(text: Mapping[str, Any], key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"text_config.{key} is {value!r}; expected a positive integer")
    return value


def _read_layer_types(text: Mapping[str, Any]) -> tuple[tuple[str, ...], int | None]:
    """The kind of each layer and the window, as transformers derives them where `layer_types` is not given.

    Mistral has a window in all layers or in none; Qwen from `max_window_layers` on, if it is switched on.
    """
    number, model_type = _integer(text, "num_hidden_layers"), text["model_type"]
    window = text.get("sliding_window", 4096 if model_type == "mistral" else None)  # transformers' default
    if model_type in ("qwen2", "qwen3") and not text.get("use_sliding_window", False):
        window = None
    given = text.get("layer_types")
    if given is not None and model_type != "mistral":
        types = tuple(given)
    elif window is None or model_type == "llama":
        types = (FULL,) * number
    else:
        first = 0 if model_type == "mistral" else int(text.get("max_window_layers", 28))
        types = tuple(SLIDING if layer >= first else FULL for layer in range(number))
    if len(types) != number or not set(types) <= {FULL, SLIDING}:
        raise ValueError(f"text_config.layer_types {given!r} is not supported; expected {number} of {FULL}, {SLIDING}")
    if SLIDING in types and (not isinstance(window, int) or window < 1):
        raise ValueError(f"text_config.sliding_window is {window!r}, and layer_types has {SLIDING}; expected a positive integer")
    return types, window if SLIDING in types else None


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
