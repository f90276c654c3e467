"""What `vlserve quantize` is asked for, checked once. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlserve.errors import ConfigError

METHODS = ("awq", "gptq", "fp8", "rtn")
FORMATS = ("awq", "compressed-tensors")
GROUP_SIZES = (128, 64, 32)
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
GENERATED, TEXT = "generated", "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Raises ConfigError naming the option.

    Args:
        model, revision: as everywhere. out: the folder to write.
        format: None takes the method's usual one.
        calibration: `generated`, `text`, or the path of a JSONL file; None: generated, or text for a model that sees nothing.
        samples: conversations in all; every eighth is held out to measure with.
        dtype: what layers are run in; the search itself is in float32. auto: float32 on the CPU, bfloat16 on CUDA.
        force: start afresh, and replace a checkpoint that is in `out`.
    """

    model: str
    out: Path
    method: str = "awq"
    format: str | None = None
    group_size: int = 128
    calibration: str | None = None
    samples: int = 128
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHODS), ("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        if self.format not in (None, *FORMATS):
            raise ConfigError(f"format is {self.format!r}; expected one of {', '.join(FORMATS)}")
        if self.method == "fp8" and self.format == "awq":
            raise ConfigError("format 'awq' holds 4-bit weights only; for method 'fp8' give format 'compressed-tensors'")
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(f"group_size is {self.group_size!r}; expected one of {', '.join(map(str, GROUP_SIZES))}")
        if self.samples < 2:
            raise ConfigError(f"samples is {self.samples}; expected 2 or more, one of which is held out to measure with")

    @property
    def stored_format(self) -> str:
        return self.format or ("compressed-tensors" if self.method == "fp8" else "awq")
