"""From a Hugging Face text config to a `DecoderConfig`: a reader for each `model_type`, which refuses what the decoder cannot do.

A decoder that differs in numbers alone is a reader here; one that computes something else has a class as well (decoders.py).
Raises ValueError with the offending key; knows nothing of files. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vlserve.llm.config import FULL, SLIDING, DecoderConfig, ExpertsConfig
from vlserve.llm.read_rope import read_number, read_rope

Text = Mapping[str, Any]
MISTRALS_WINDOW = 4096  # where its config does not say
OF_THE_TEXT = ("rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings")  # without effect beside text_config
NULLS = ("num_key_value_heads", "sliding_window")  # null has a meaning: as many as query heads; no window
# what transformers' config classes take where a config.json says nothing
_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_LLAMA = _QWEN | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "internlm2": _LLAMA | {"vocab_size": 103168},
    "internlm3": _LLAMA | {"vocab_size": 128512, "max_position_embeddings": 32768},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "phi3": _LLAMA
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "qwen3_moe": _QWEN
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
    },
}


def read_text_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the `text_config` of a whole config.json; raises ValueError as `read_decoder_config`."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config is {text!r}; expected an object")
    for key in OF_THE_TEXT:
        if config.get(key) and config[key] != with_defaults(text).get(key):
            raise ValueError(f"config.json has {key} at its top level, where it has no effect; move it into text_config")
    return read_decoder_config(dict(text) | {"tie_word_embeddings": is_tied(config, text)})


def read_decoder_config(text: Text) -> DecoderConfig:
    """Read `text_config`; raises ValueError naming the key that is missing or not supported."""
    model_type = text.get("model_type")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise ValueError(f"text_config.model_type {model_type!r} is not supported; supported: {', '.join(READERS)}")
    return READERS[model_type](with_defaults(text))


def with_defaults(text: Text) -> dict[str, Any]:
    """A text config with what its model_type takes for keys that are missing; null is missing, but for NULLS."""
    given = {key: value for key, value in text.items() if value is not None or key in NULLS}
    if text.get("model_type") == "qwen3_moe" and "num_local_experts" in given:  # as transformers 5 writes it
        given.setdefault("num_experts", given["num_local_experts"])
    return dict(DEFAULTS.get(str(text.get("model_type")), {})) | given


def is_tied(config: Mapping[str, Any], text: Text) -> bool:
    """Whether the head is the embedding, by config.json alone; what is stored says it better."""
    flags = (text.get("tie_word_embeddings"), config.get("tie_word_embeddings"))
    return bool(next((flag for flag in flags if flag is not None), False))


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
        rms_norm_eps=read_number(text, "rms_norm_eps", default=1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(text.get("mlp_bias", False)),
        qk_norm=False,
        rope=read_rope(text, head_dim, max_positions),
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


def read_qwen3_moe(text: Text) -> DecoderConfig:
    """As Qwen3, with experts in every `decoder_sparse_step`th layer that `mlp_only_layers` does not have; a window in all layers
    or in none."""
    window = text["sliding_window"] if text.get("use_sliding_window", False) else None
    layers = _layers(text, given=None, window=window, first=0)
    return replace(read_llama(text), mlp_bias=False, qk_norm=True, experts=_qwen_experts(text), **layers)


def read_internlm2(text: Text) -> DecoderConfig:
    """One switch for the biases of attention, none in the MLP."""
    bias = bool(text.get("bias", True))
    return replace(read_llama(text), qkv_bias=bias, output_bias=bias, mlp_bias=False)


def read_internlm3(text: Text) -> DecoderConfig:
    """Biases of query, key and value, and of all else."""
    bias = bool(text.get("bias", False))
    return replace(read_llama(text), qkv_bias=bool(text.get("qkv_bias", False)), output_bias=bias, mlp_bias=bias)


def read_phi3(text: Text) -> DecoderConfig:
    """No biases; a window in all layers or in none."""
    if text.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"text_config.partial_rotary_factor {text['partial_rotary_factor']!r} is not supported; supported: 1.0")
    layers = _layers(text, given=None, window=text.get("sliding_window"), first=0)
    return replace(read_llama(text), qkv_bias=False, output_bias=False, mlp_bias=False, **layers)


READERS: Mapping[str, Callable[[Text], DecoderConfig]] = {
    "internlm2": read_internlm2,
    "internlm3": read_internlm3,
    "llama": read_llama,
    "mistral": read_mistral,
    "phi3": read_phi3,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
    "qwen3_moe": read_qwen3_moe,
}


def _qwen_layers(text: Text) -> dict[str, Any]:
    window = text.get("sliding_window") if text.get("use_sliding_window", False) else None
    first = text.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ValueError(f"text_config.max_window_layers is {first!r}; expected a whole number")
    return _layers(text, given=text.get("layer_types"), window=window, first=first)


def _qwen_experts(text: Text) -> ExpertsConfig | None:
    """None where no layer has any."""
    number, step, dense = text["num_experts"], _integer(text, "decoder_sparse_step"), text.get("mlp_only_layers") or []
    if not isinstance(dense, (list, tuple)) or not all(isinstance(layer, int) for layer in dense):
        raise ValueError(f"text_config.mlp_only_layers is {dense!r}; expected a list of layers' numbers")
    layers = [layer for layer in range(step - 1, _integer(text, "num_hidden_layers"), step) if layer not in dense]
    if number == 0 or not layers:
        return None
    number, top_k = _integer(text, "num_experts"), _integer(text, "num_experts_per_tok")
    if top_k > number:
        raise ValueError(f"text_config.num_experts_per_tok {top_k} is more than num_experts {number}")
    return ExpertsConfig(
        layers=tuple(layers),
        num_experts=number,
        top_k=top_k,
        width=_integer(text, "moe_intermediate_size"),
        norm_topk_prob=bool(text.get("norm_topk_prob", False)),
    )


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
