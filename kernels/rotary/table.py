"""The tables of rotary position embedding: the frequencies of each scaling, and cos and sin of every position.

Sources: NTK-aware and dynamic scaling as in transformers'
`modeling_rope_utils`; YaRN, Peng et al. 2023 (arXiv 2309.00071); the llama3 rule of Llama 3.1;
LongRoPE, Ding et al. 2024 (arXiv 2402.13753).
Shapes: D head_dim, R channels of a head that are turned, P positions.
"""

from __future__ import annotations

import math

import torch

from vlserve.kernels.rope import RopeConfig


def rotary_frequencies(config: RopeConfig, max_positions: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [R/2] in float32 and the factor on cos and sin.

    Dynamic NTK depends on the longest position in use. A cached key must not change with later
    tokens, so the base is fixed for `max_positions` once: equal to transformers' for a prompt of
    that length, and to no scaling at all up to `original_max_positions`. LongRoPE's two sets of
    factors are chosen once in the same way.
    """
    exponent = torch.arange(0, config.dim, 2, dtype=torch.int64).float() / config.dim
    base = 1.0 / (config.theta**exponent)
    if config.rope_type == "linear":
        return base / config.factor, 1.0
    if config.rope_type == "dynamic":
        return _dynamic(config, exponent, max_positions), 1.0
    if config.rope_type == "llama3":
        return _llama3(config, base), 1.0
    if config.rope_type == "yarn":
        return _yarn(config, base)
    if config.rope_type == "longrope":
        factors = config.long_factor if max_positions > config.original_max_positions else config.short_factor
        return 1.0 / (torch.tensor(factors) * config.theta**exponent), _longrope_attention_factor(config)
    return base, 1.0


def rotary_table(config: RopeConfig, max_positions: int) -> torch.Tensor:
    """cos and sin of every position: float32 [P, 2, D/2]; those of pairs that are not turned come last, and are 1 and 0."""
    frequencies, factor = rotary_frequencies(config, max_positions)
    angles = torch.outer(torch.arange(max_positions).float(), frequencies)  # [P, R/2]
    turned = torch.stack((angles.cos() * factor, angles.sin() * factor), dim=1)
    if config.dim == config.head_dim:
        return turned
    still = torch.tensor((1.0, 0.0))[:, None].expand(max_positions, 2, (config.head_dim - config.dim) // 2)
    return torch.cat((turned, still), dim=2)


def _dynamic(config: RopeConfig, exponent: torch.Tensor, max_positions: int) -> torch.Tensor:
    length = max(max_positions, config.original_max_positions)
    stretch = config.factor * length / config.original_max_positions - (config.factor - 1)
    theta = config.theta * stretch ** (config.dim / (config.dim - 2))
    return 1.0 / (theta**exponent)


def _llama3(config: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    wavelength = 2 * math.pi / base
    low = config.original_max_positions / config.low_freq_factor
    high = config.original_max_positions / config.high_freq_factor
    smooth = (config.original_max_positions / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - smooth) * base / config.factor + smooth * base
    scaled = torch.where(wavelength > low, base / config.factor, base)
    return torch.where((wavelength <= low) & (wavelength >= high), blended, scaled)


def _yarn(config: RopeConfig, base: torch.Tensor) -> tuple[torch.Tensor, float]:
    def correction(rotations: float) -> float:
        span = config.original_max_positions / (rotations * 2 * math.pi)
        return config.dim * math.log(span) / (2 * math.log(config.theta))

    low, high = correction(config.beta_fast), correction(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    if low == high:
        high += 0.001  # avoids a division by zero
    ramp = ((torch.arange(config.dim // 2).float() - low) / (high - low)).clamp(0, 1)
    frequencies = base / config.factor * ramp + base * (1 - ramp)
    return frequencies, _yarn_attention_factor(config)


def _yarn_attention_factor(config: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def _longrope_attention_factor(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    return 1.0 if config.factor <= 1 else math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_positions))
