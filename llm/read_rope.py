"""From a text config's rotary settings to a `RopeConfig`, as transformers' `RotaryEmbeddingConfigMixin` reads them. No torch.

Raises ValueError with the offending key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlserve.kernels.rope import RopeConfig

_NUMBERS = (
    *("low_freq_factor", "high_freq_factor"),  # llama3
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),  # yarn
)
_REQUIRED = {
    **dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",)),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
LONG = {"su": "longrope"}  # the older name
# scale from original_max_position_embeddings, not from max_position_embeddings
_FROM_PRETRAINING = ("yarn", "llama3", "longrope")


def read_rope(
    text: Mapping[str, Any], head_dim: int, max_positions: int, *, is_partial: bool = False, other_names: Mapping[str, str] = LONG
) -> RopeConfig:
    """`rope_scaling` with `rope_theta` beside it, or `rope_parameters` (transformers 5); of both, the first counts.

    Args:
        is_partial: whether `partial_rotary_factor` may be less than 1. other_names: of a rope_type, to the one that it is.
    """
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    stored = text.get(key) or {}
    if not isinstance(stored, Mapping) or any(isinstance(value, Mapping) for value in stored.values()):
        raise ValueError(f"text_config.{key} {stored!r} is not supported; expected one setting for all layers")
    given = {name: value for name, value in stored.items() if value is not None}
    rope_type = str(given.get("rope_type") or given.get("type") or "default")
    rope_type = other_names.get(rope_type, rope_type)
    if rope_type == "default" and given.get("factor", 1) != 1:
        raise ValueError(f'text_config.{key} has factor {given["factor"]!r} and no rope_type; add one, for example "yarn"')
    partial = given.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0) and not is_partial:
        raise ValueError(f"text_config partial_rotary_factor {partial} is not supported; supported: 1")
    rotary_dim = int(head_dim * read_number({"partial_rotary_factor": partial or 1}, "partial_rotary_factor"))
    if rotary_dim > head_dim:
        raise ValueError(f"text_config.partial_rotary_factor is {partial!r}; expected a number up to 1")
    where = f"text_config.{key}."
    original = max_positions
    if rope_type in _FROM_PRETRAINING:
        # transformers: where it stands beside the settings, that one counts
        given |= {name: text[name] for name in ("original_max_position_embeddings",) if text.get(name) is not None}
        original = int(read_number(given, "original_max_position_embeddings", where, max_positions))
        if original < 2:
            raise ValueError(f"{where}original_max_position_embeddings is {original}; expected a whole number above 1")
    for name in _REQUIRED.get(rope_type, ()):
        # transformers: yarn's may be null, and then the lengths tell it
        if name not in given and not (rope_type == "yarn" and name in stored and original < max_positions):
            raise ValueError(f"text_config.{key} has no {name}, which rope_type {rope_type!r} needs; the model's page tells it")
    optional: dict[str, Any] = {name: read_number(given, name, where) for name in _NUMBERS if name in given}
    if rope_type == "longrope":
        optional |= {name: _factors(given, name, where, rotary_dim // 2) for name in ("short_factor", "long_factor")}
    if "truncate" in given:
        optional["truncate"] = bool(given["truncate"])
    theta = given.get("rope_theta", text.get("rope_theta"))
    return RopeConfig(
        head_dim=head_dim,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        theta=read_number({} if theta is None else {"rope_theta": theta}, "rope_theta", "text_config.", 10000.0),
        rope_type=rope_type,
        factor=read_number(given, "factor", where, max_positions / original),  # of yarn and longrope
        original_max_positions=original,
        **optional,
    )


def _factors(given: Mapping[str, Any], key: str, where: str, number: int) -> tuple[float, ...]:
    """A list with a factor for each frequency."""
    factors = given[key]
    if not isinstance(factors, list) or len(factors) != number:
        found = f"has {len(factors)} numbers" if isinstance(factors, list) else f"is {factors!r}"
        raise ValueError(f"{where}{key} {found}; expected {number}, one for each pair of a head's channels that is turned")
    return tuple(read_number({key: factor}, key, where) for factor in factors)


def read_number(given: Mapping[str, Any], key: str, where: str = "text_config.", default: float | None = None) -> float:
    """A number above 0; `default` where there is none."""
    value = given.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{where}{key} is {value!r}; expected a number above 0")
    return float(value)
