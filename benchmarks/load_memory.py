"""Measures the memory that a rank takes at its highest while it loads its part of a checkpoint, which is made here.

The figure is the growth of RssAnon, a process's own memory, looked at every millisecond; each rank loads in a process of its own.
Pages of the mapped weight files belong to the system, which takes them back when it likes: they are in the column "with mapped
files" (VmRSS) and in no other. Linux only. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlserve.config import EngineConfig
from vlserve.engine.loading import load_model  # and what it imports: their memory is not the weights'
from vlserve.engine.memory import release_leftovers, weight_bytes
from vlserve.llm.formats import Slot
from vlserve.llm.int4_packing import AWQ_GEMM
from vlserve.llm.tensor_parallel import Group, Split
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.internvl import INTERNVL
from vlserve.vision import internvit_tower as _encoder  # noqa: F401  (its libraries take memory of their own)

TEXT = {
    "model_type": "qwen2",
    "vocab_size": 10_001,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": [56, 56],
    "patch_size": [14, 14],
}
LAYER_BYTES, TABLE_BYTES = 2 * (1024 * (2 * 1024 + 2 * 256) + 3 * 1024 * 4096), 2 * 2 * 10_001 * 1024
FILES, GROUP = 3, 128
Stored = tuple[tuple[int, ...], torch.dtype]


class Alone(Group):
    """A rank whose partners are not there: loading asks nothing of them."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def make_checkpoint(folder: Path, num_bytes: float, *, is_awq: bool = False) -> int:
    """Weights in bfloat16, the decoder's perhaps as AWQ, of about `num_bytes` in several files; the largest tensor's bytes."""
    layer_bytes = LAYER_BYTES * (0.26 if is_awq else 1)
    text = TEXT | {"num_hidden_layers": max(1, round((num_bytes - TABLE_BYTES) / layer_bytes))}
    config = {"model_type": "internvl", "text_config": text, "vision_config": VISION, "dtype": "bfloat16", "image_token_id": 0}
    config["tie_word_embeddings"] = False  # all numbers are alike
    if is_awq:
        config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        targets = INTERNVL.build(config, INTERNVL.preprocessor(config, {}), Split()).targets()
    shapes = {name: (t.full if isinstance(t, Slot) else tuple(t.shape), torch.bfloat16) for name, t in targets.items()}
    if is_awq:
        shapes = dict(_packed(shapes))
    where = {name: f"model-{i * FILES // len(shapes)}.safetensors" for i, name in enumerate(shapes)}
    for file in sorted(set(where.values())):
        tensors = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in shapes.items() if where[name] == file}
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return max(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes.values())


def _packed(shapes: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
    """With the tensors of AWQ in place of the decoder's linear layers."""
    for name, (shape, dtype) in shapes.items():
        if not name.endswith("_proj.weight") or "language_model." not in name:
            yield name, (shape, dtype)
            continue
        for part, stored in AWQ_GEMM.shapes(*shape, GROUP).items():
            yield name.removesuffix("weight") + part, (stored, torch.float16 if part == "scales" else torch.int32)


def resident_bytes() -> tuple[int, int]:
    """This process's own memory, and with the pages of mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024, int(status["VmRSS"].split()[0]) * 1024


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own: a fork of this one, which has imported everything and made nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()  # the other end is the process's: EOFError when that fails
    result = receiver.recv()
    process.join()
    return result


def load(folder: Path, rank: int, tp: int) -> dict[str, int]:
    """In this process; call it once."""
    checkpoint, config = read_checkpoint(folder), EngineConfig(model=str(folder), tp=tp, device="cpu")
    release_leftovers(torch.device("cpu"))
    before, is_done = resident_bytes(), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while True:
            is_last = is_done.wait(0.001)
            now = resident_bytes()
            peak = max(peak[0], now[0]), max(peak[1], now[1])
            if is_last:
                return

    watching = threading.Thread(target=watch)
    watching.start()
    model = load_model(checkpoint, config, Split(group=Alone(rank, tp)), torch.device("cpu"), lambda name, done, total: None)
    is_done.set()
    watching.join()
    return {
        "tp": tp,
        "rank": rank,
        "shard_bytes": sum(weight_bytes(model).values()),
        "peak_growth_bytes": peak[0] - before[0],
        "with_mapped_files_bytes": peak[1] - before[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="of the checkpoint that is made")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--awq", action="store_true", help="the decoder in 4 bits")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made; default: a temporary folder")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        largest = alone(partial(make_checkpoint, folder, 1e6 * args.megabytes, is_awq=args.awq))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"a checkpoint of {size / 1e6:.0f} MB, its largest tensor {largest / 1e6:.1f} MB; in MB:")
        print(f"{'tp':>4} {'rank':>5} {'shard':>8} {'highest':>8} {'above the shard':>16} {'with mapped files':>18}")
        ranks: list[dict[str, Any]] = []
        for tp in args.tp:
            for rank in range(tp):
                found = alone(load, folder, rank, tp)
                ranks.append(found | {"largest_tensor_bytes": largest})
                shard, peak, mapped = (
                    found[key] / 1e6 for key in ("shard_bytes", "peak_growth_bytes", "with_mapped_files_bytes")
                )
                print(f"{tp:4d} {rank:5d} {shard:8.1f} {peak:8.1f} {peak - shard:16.1f} {mapped:18.1f}")
    print(json.dumps({"checkpoint_bytes": size, "ranks": ranks}))


if __name__ == "__main__":
    main()
