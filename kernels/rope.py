"""Settings of rotary position embedding. No torch here, so that a checkpoint's shape can be read without it."""

from __future__ import annotations

from dataclasses import dataclass

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """The fields of a checkpoint's `rope_parameters` (older: `rope_theta` and `rope_scaling`)."""

    head_dim: int
    rotary_dim: int | None = None  # channels of a head that are turned; None: all
    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_positions: int = 8192  # tokens; where the scaling starts from
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope; None: derived from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: of each frequency, for contexts up to original_max_positions
    long_factor: tuple[float, ...] = ()  # longrope: the same, for longer ones

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type {self.rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        if self.head_dim % 2 or self.dim % 2:
            name = "head_dim" if self.head_dim % 2 else "rotary_dim"
            raise ValueError(f"{name} {getattr(self, name)} is odd; rotary embedding turns pairs of channels")

    @property
    def dim(self) -> int:
        """Channels of a head that are turned."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def reach(self) -> int:
        """Tokens that the scaling is for; 0 where `max_position_embeddings` counts it already (llama3) or nothing is scaled."""
        return int(self.factor * self.original_max_positions) if self.rope_type in ("linear", "dynamic", "yarn") else 0
