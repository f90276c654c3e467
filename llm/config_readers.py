"""From a Hugging Face text config to a `DecoderConfig`: a reader for each `model_type`, which refuses what the decoder cannot do.

A decoder that differs in numbers alone is a reader here; one that computes something else has a class as well (decoders.py).
Raises ValueError with the offending key; knows nothing of files. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vlserve.kernels.rope import RopeConfig
from vlserve.llm.config import FULL, SLIDING, DecoderConfig

Text = Mapping[str, Any]
MISTRALS_WINDOW = 4096  # where its config does not say; transformers' default
_OPTIONAL_ROPE_KEYS = (
    *("low_freq_factor", "high_freq_factor"),  # llama3
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),  # yarn
)


def read_text_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the `text_config` of a whole config.json; raises ValueError as `read_decoder_config`."""
    stored = config.get("text_config") or {}
    if not isinstance(stored, Mapping):
        raise ValueError(f"text_config is {stored!r}; expected an object")
    text = dict(stored)
    # transformers ties the head when either the outer or the text config says so
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    return read_decoder_config(text)


def read_decoder_config(text: Text) -> DecoderConfig:
    """Read `text_config`; raises ValueError naming the key that is missing or not supported."""
    model_type = str(text.get("model_type"))
    if model_type not in READERS:
        raise ValueError(f"text_config.model_type {model_type!r} is not supported; supported: {', '.join(READERS)}")
    return READERS[model_type](text)


def read_llama(text: Text) -> DecoderConfig:
    """The shape that the others vary: full attention without biases but where `attention_bias` and `mlp_bias` say so."""
    if text.get("hidden_act", "silu") != "silu":
        raise ValueError(f"text_config.hidden_act {text['hidden_act']!r} is not supported; supported: silu")
    heads = _integer(text, "num_attention_heads")
    kv_heads = _integer(text, "num_key_value_heads") if text.get("num_key_value_heads") is not None else heads
    if heads % kv_heads:
        raise ValueError(f"text_config.num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    hidden = _integer(text, "hidden_size")
    head_dim = _integer(text, "head_dim") if text.get("head_dim") is not None else hidden // heads
    bias, max_positions = bool(text.get("attention_bias", False)), _integer(text, "max_position_embeddings")
    return DecoderConfig(
        model_type=text["model_type"],
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
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
        qk_norm=False,
        rope=_read_rope(text, head_dim, max_positions),
        **_layers(text, given=None, window=None, first=0),
    )


def read_mistral(text: Text) -> DecoderConfig:
    """No bias in the output projection and the MLP; a window in all layers or in none."""
    layers = _layers(text, given=None, window=text.get("sliding_window", MISTRALS_WINDOW), first=0)
    return replace(read_llama(text), output_bias=False, mlp_bias=False, **layers)


def read_qwen2(text: Text) -> DecoderConfig:
    """Biases of query, key and value alone; a window from `max_window_layers` on, where it is switched on."""
    return replace(read_llama(text), qkv_bias=True, output_bias=False, mlp_bias=False, **_qwen_layers(text))


def read_qwen3(text: Text) -> DecoderConfig:
    """A norm of each head's query and key, and windows as Qwen2."""
    return replace(read_llama(text), mlp_bias=False, qk_norm=True, **_qwen_layers(text))


READERS: Mapping[str, Callable[[Text], DecoderConfig]] = {
    "llama": read_llama,
    "mistral": read_mistral,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
}


def _qwen_layers(text: Text) -> dict[str, Any]:
    window = text.get("sliding_window") if text.get("use_sliding_window", False) else None
    first = text.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ValueError(f"text_config.max_window_layers is {first!r}; expected a whole number")
    return _layers(text, given=text.get("layer_types"), window=window, first=first)


def _layers(text: Text, *, given: Any, window: Any, first: int) -> dict[str, Any]:
    """`layer_types` and `sliding_window`: kinds that are `given`, or a window, where there is one, from layer `first` on."""
    number = _integer(text, "num_hidden_layers")
    types = [FULL if window is None or layer < first else SLIDING for layer in range(number)] if given is None else given
    if not isinstance(types, (list, tuple)) or len(types) != number or any(kind not in (FULL, SLIDING) for kind in types):
        raise ValueError(f"text_config.layer_types {given!r} is not supported; expected {number} of {FULL}, {SLIDING}")
    if SLIDING not in types:
        return {"layer_types": tuple(types), "sliding_window": None}
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"text_config.sliding_window is {window!r}, and layer_types has {SLIDING}; expected a positive integer")
    return {"layer_types": tuple(types), "sliding_window": window}


def _integer(text: Text, key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"text_config.{key} is {value!r}; expected a positive integer")
    return value


def _read_rope(text: Text, head_dim: int, max_positions: int) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    stored = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(stored, Mapping) or any(isinstance(value, Mapping) for value in stored.values()):
        raise ValueError(f"text_config.rope_parameters {stored!r} is not supported; expected one setting for all layers")
    given: dict[str, Any] = dict(stored)
    rope_type = str(given.get("rope_type") or given.get("type") or "default")
    partial = given.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"text_config partial_rotary_factor {partial} is not supported; supported: 1")
    optional = {key: given[key] for key in _OPTIONAL_ROPE_KEYS if given.get(key) is not None}
    return RopeConfig(
        head_dim=head_dim,
        theta=float(given.get("rope_theta") or text.get("rope_theta") or 10000.0),
        rope_type=rope_type,
        factor=float(given.get("factor", 1.0)),
        original_max_positions=int(given.get("original_max_position_embeddings") or max_positions),
        **optional,
    )
