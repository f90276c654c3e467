"""`vlserve shard`: a checkpoint cut for a tensor-parallel degree in advance, so that each rank reads its own part only.

Owns what is copied; llm/shard_writer.py cuts.
"""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import vlserve
from vlserve.config import DTYPES, EngineConfig
from vlserve.errors import ConfigError, ModelError
from vlserve.llm.shards import FORMAT, Shards, read_shards, split_flags, write_shards
from vlserve.models.checkpoint import Checkpoint, find_folder, read_checkpoint
from vlserve.models.companion_files import companion_files, copy_companions
from vlserve.plan.tp_plan import check_tp
from vlserve.whole_folder import check_out, check_room, gib, whole_or_nothing

if TYPE_CHECKING:
    from vlserve.llm.shard_writer import ShardWriter

HELP = "Cut a checkpoint for a tensor-parallel degree in advance, for slow disks."
DESCRIPTION = """\
Cut a checkpoint for a tensor-parallel degree in advance, for slow disks.

From an ordinary checkpoint each rank reads its slices, which lie scattered over all files. The folder OUT has one
file for each rank with just its part, and one that all ranks read, with what is not split: the vision encoder, the
projector, the norms. Config, tokenizer and templates are copied, but no .py files, which vlserve never reads. The
original is read once and not changed.
"""
EXAMPLE = """\
example:
  vlserve shard OpenGVLab/InternVL3-8B-hf --tp 4 /fast/internvl3-8b-tp4
  vlserve serve /fast/internvl3-8b-tp4 --tp 4

OUT is for this degree (and this --replicate-kv-heads and --expert-parallel) only; serving it with another one is an
error. It appears when it is whole: what is under way is in a folder .OUT.partial-* beside it, which Ctrl-C and errors remove.
"""
CARD = "*.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EXAMPLE
    options = EngineConfig.__dataclass_fields__
    parser.add_argument("model", metavar="MODEL", help=options["model"].metadata["help"])
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; new or empty")
    parser.add_argument("--tp", type=int, required=True, metavar="N", help=options["tp"].metadata["help"])
    for name in ("replicate_kv_heads", "expert_parallel"):
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=options[name].metadata["help"])
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="type to store; auto leaves each tensor as it is stored (default: auto)"
    )
    parser.add_argument("--revision", metavar="TEXT", help=options["revision"].metadata["help"])


def run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleaned up after like Ctrl-C
    names = ("model", "tp", "replicate_kv_heads", "expert_parallel", "dtype", "revision")
    config = EngineConfig(**{name: getattr(options, name) for name in names})
    print(shard(config, options.out))
    print(f"serve it with: vlserve serve {quote(str(options.out))} {split_flags(config)}")
    return 0


def shard(config: EngineConfig, out: Path) -> str:
    """Write the folder `out`; returns what was written, in words.

    Raises ConfigError for a degree or a folder that does not do, ModelError for a checkpoint that is not whole.
    """
    out = check_out(out)
    checkpoint = read_checkpoint(find_folder(config.model, config.revision))
    _check_unsharded(checkpoint)
    _check_dense(checkpoint)
    ways = {"replicate_kv_heads": config.replicate_kv_heads, "expert_parallel": config.expert_parallel}
    check_tp(checkpoint.config, config.tp, **ways, source=str(checkpoint.folder / "config.json"))
    writer = _writer(checkpoint, config)
    copied = companion_files(checkpoint.folder, CARD)
    num_bytes = writer.num_bytes + sum((checkpoint.folder / path).stat().st_size for path in copied)
    check_room(out, num_bytes)
    from tqdm import tqdm

    with whole_or_nothing(out) as partial:
        copy_companions(copied, checkpoint.folder, partial)
        if config.dtype != "auto":
            _set_dtype(partial / "config.json", config.dtype)
        shards = Shards(format=FORMAT, vlserve=vlserve.__version__, tp=config.tp, **ways, ranks=writer.rank_files)
        write_shards(partial, shards)
        with tqdm(
            desc=f"{writer.num_files} files", total=writer.num_bytes, unit="B", unit_scale=True, unit_divisor=1024, disable=None
        ) as bar:
            writer.write(partial, bar.update)
    return f"{out}: {writer.num_files} weight files for {config.tp} ranks, {gib(num_bytes)}"


def _check_unsharded(checkpoint: Checkpoint) -> None:
    try:
        shards = read_shards(checkpoint.folder)
    except ValueError as error:
        raise ModelError(str(error)) from error
    if shards is not None:
        raise ConfigError(f"{checkpoint.folder} is sharded for tp {shards.tp} already; shard again from the original checkpoint")


def _check_dense(checkpoint: Checkpoint) -> None:
    try:
        quantisation = checkpoint.quantisation
    except ValueError as error:
        raise ModelError(str(error)) from error
    if quantisation is not None:
        raise ConfigError(
            f"{checkpoint.folder} is quantised ({quantisation}), and only unquantised checkpoints are sharded. Serve it as it "
            "is: each rank reads its own part of every tensor, which is a quarter to a half of a 16-bit one"
        )


def _writer(checkpoint: Checkpoint, config: EngineConfig) -> ShardWriter:
    """With every rank's shapes, which take no memory, and the weight files' headers."""
    import torch

    from vlserve.engine.loading import build_model
    from vlserve.llm.shard_writer import OfflineGroup, ShardWriter
    from vlserve.llm.tensor_parallel import Split

    try:
        ways = {"replicate_kv_heads": config.replicate_kv_heads, "expert_parallel": config.expert_parallel}
        splits = [Split(group=OfflineGroup(rank, config.tp), **ways) for rank in range(config.tp)]
        models = [build_model(checkpoint, split) for split in splits]
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        return ShardWriter(checkpoint.folder, [model.targets() for model in models], rename=models[0].rename, dtype=dtype)
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(str(error)) from error


def _set_dtype(path: Path, dtype: str) -> None:
    """What a start with `--dtype auto` computes in."""
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": dtype}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
