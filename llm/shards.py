"""A checkpoint that is cut for tensor parallelism already: the file that says so, and which files each rank reads. No torch.

The files are safetensors: one for each rank with its parts, under the checkpoint's names and in the parameters' shapes
(padding is stored), and one that every rank reads, with what all of them take whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

LIST, FORMAT = "vlserve_shards.json", 1


class Shards(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What LIST holds."""

    format: int
    vlserve: str  # the version that wrote it
    tp: int
    replicate_kv_heads: bool
    expert_parallel: bool = False
    ranks: list[list[str]]  # each rank's file names

    def files(self, folder: Path, rank: int) -> list[Path]:
        """What a rank reads; raises FileNotFoundError."""
        files = [folder / name for name in self.ranks[rank]]
        absent = [path.name for path in files if not path.exists()]
        if absent:
            raise FileNotFoundError(
                f"{LIST} names {', '.join(absent)} for rank {rank}, which {folder} lacks; copy all of its files"
            )
        return files


class Degree(Protocol):
    """How a model is split: a folder's own, or an `EngineConfig`."""

    @property
    def tp(self) -> int: ...
    @property
    def replicate_kv_heads(self) -> bool: ...
    @property
    def expert_parallel(self) -> bool: ...


def split_flags(degree: Degree) -> str:
    """As words of the command line; two degrees with the same flags are the same."""
    others = {"--replicate-kv-heads": degree.replicate_kv_heads, "--expert-parallel": degree.expert_parallel}
    return " ".join([f"--tp {degree.tp}", *(flag for flag, is_on in others.items() if is_on)])


class _Version(msgspec.Struct):
    format: int
    vlserve: str = "an unknown version"


def read_shards(folder: Path) -> Shards | None:
    """None for an ordinary checkpoint; raises ValueError for a list that is damaged or of another format."""
    path = folder / LIST
    if not path.exists():
        return None
    data = path.read_bytes()
    try:
        version = msgspec.json.decode(data, type=_Version)
        if version.format != FORMAT:
            raise ValueError(
                f"{path} has format {version.format}, written by vlserve {version.vlserve}; this version reads format {FORMAT}: "
                "shard again from the original checkpoint"
            )
        shards = msgspec.json.decode(data, type=Shards)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {error}; shard again from the original checkpoint") from error
    if len(shards.ranks) != shards.tp or any(Path(name).name != name for names in shards.ranks for name in names):
        raise ValueError(f"{path} does not list plain file names for each of {shards.tp} ranks; shard again from the original")
    return shards


def write_shards(folder: Path, shards: Shards) -> None:
    (folder / LIST).write_bytes(msgspec.json.format(msgspec.json.encode(shards), indent=2) + b"\n")
