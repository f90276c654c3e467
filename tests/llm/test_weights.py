"""Loading is strict both ways on every rank, whole or in shards, and takes little more memory than what it fills."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.llm.parts import build, full_shapes, random_text_config, save_checkpoint, splits
from vlserve.llm.formats import Slot
from vlserve.llm.tensor_parallel import Span
from vlserve.llm.weights import load_weights

ROOT = Path(__file__).parents[2]
TEXT: dict[str, Any] = random_text_config(random.Random(3), 2) | {"tie_word_embeddings": False, "vocab_size": 9}
WIDE = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, full_shapes(build(TEXT, splits(1)[0])))
    return tmp_path


def shard(folder: Path, number: int) -> None:
    """Spread the one file over several."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{i % number}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add or replace tensors, or leave them out (None); dots in names are written as __."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = load_file(folder / "model.safetensors") | named
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("tp", (1, 2))
def test_shards_equal_one_file(tp: int, folder: Path) -> None:
    whole = [build(TEXT, split) for split in splits(tp)]
    sizes = [load_weights(folder, decoder.targets()) for decoder in whole]
    shard(folder, 3)
    steps: list[tuple[int, int]] = []
    for decoder, size, split in zip(whole, sizes, splits(tp), strict=True):
        parts = build(TEXT, split)
        assert load_weights(folder, parts.targets(), progress=lambda *at: steps.append(at)) == size
        assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), parts.parameters(), strict=True))
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)] * tp
    assert tp == 1 or sum(sizes) < 2 * 4 * sum(p.numel() for p in build(TEXT, splits(1)[0]).parameters()), "parts are read"


@pytest.mark.parametrize("tp", (1, 2))
@pytest.mark.parametrize("rank", (0, 1))
def test_what_does_not_fit_is_named_on_every_rank(tp: int, rank: int, folder: Path) -> None:
    split = splits(tp)[rank % tp]
    width, hidden = TEXT["intermediate_size"], TEXT["hidden_size"]
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {WIDE.replace(".", "__"): torch.zeros(hidden, width + 1)},
            f"model.safetensors: {WIDE} is [{hidden}, {width + 1}], config.json asks for [{hidden}, {width}]",
        ),
        ({"lm_head__weight": torch.zeros(10, hidden)}, f"lm_head.weight is [10, {hidden}], config.json asks for [9, {hidden}]"),
        ({"lm_head__weight": torch.zeros(9 * hidden)}, f"lm_head.weight is [{9 * hidden}], config.json asks for [9, {hidden}]"),
        ({"model__norm__weight": None}, f"weights missing from {folder.name}: model.norm.weight; download or write them again"),
        ({WIDE.replace(".", "__"): None}, f"weights missing from {folder.name}: {WIDE}"),
        (
            {"model__norm__bias": torch.zeros(hidden)},
            f"unexpected weights in {folder.name}: model.norm.bias (not part of this architecture)",
        ),
    ]
    good = load_file(folder / "model.safetensors")
    for changes, message in cases:
        save_file(good, folder / "model.safetensors")
        change(folder, **changes)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_weights(folder, build(TEXT, split).targets())
    save_file(good, folder / "model.safetensors")
    assert load_weights(folder, build(TEXT, split).targets()) > 0


def test_a_name_given_twice_and_missing_files_are_named(folder: Path) -> None:
    targets = build(TEXT, splits(2)[1]).targets()
    change(folder, old__norm__weight=torch.zeros(TEXT["hidden_size"]))
    with pytest.raises(ValueError, match=r"(old|model)\.norm\.weight \(given twice\)"):
        load_weights(folder, targets, rename=lambda name: name.replace("old.", "model."))
    load_weights(folder, targets, rename=lambda name: None if name.startswith("old.") else name)
    shard(folder, 3)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint file missing: model-1\.safetensors"):
        load_weights(folder, targets)
    (folder / "model-1.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model-1\.safetensors is damaged or no safetensors file"):
        load_weights(folder, targets)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        load_weights(folder, targets)


def test_types_are_converted_and_numbers_without_dimensions_read(tmp_path: Path) -> None:
    whole, number = torch.randn(5, 3), torch.tensor(2.5)
    save_file({"whole": whole.bfloat16(), "number": number}, tmp_path / "model.safetensors")
    part, scalar = torch.full((3, 2), float("nan")), torch.zeros(())
    read = load_weights(tmp_path, {"whole": Slot(part, (5, 3), {0: Span(4, 5, 3), 1: Span(1, 3, 2)}), "number": scalar})
    assert torch.equal(part[:1], whole.bfloat16().float()[4:, 1:]) and not part[1:].any() and float(scalar) == 2.5
    assert read == 2 * 2 + 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("extra,megabytes", [((), 150), (("--awq",), 100)], ids=["dense", "awq"])
def test_loading_takes_little_more_than_the_shard(extra: tuple[str, ...], megabytes: int, tmp_path: Path) -> None:
    """Memory of a process's own (RssAnon), at its highest while a rank of two loads it; pages of the mapped files are the
    system's and not counted. How soon the C library gives memory back depends on the load, so the lowest of three counts.
    """
    growths: list[tuple[int, ...]] = []
    for _ in range(3):
        ranks = load_memory("--megabytes", str(megabytes), *extra, "--tp", "2", "--folder", str(tmp_path))
        assert [rank["rank"] for rank in ranks] == [0, 1]
        for rank in ranks:
            assert 0.48 * megabytes < rank["shard_bytes"] / 1e6 < 0.57 * megabytes and 0 < rank["largest_tensor_bytes"] < 30e6
            assert rank["shard_bytes"] <= rank["peak_growth_bytes"]
        growths.append(tuple(rank["peak_growth_bytes"] for rank in ranks))
        bounds = [rank["shard_bytes"] + rank["largest_tensor_bytes"] + 20e6 for rank in ranks]
        if all(min(of_rank) <= bound for of_rank, bound in zip(zip(*growths, strict=True), bounds, strict=True)):
            return
    raise AssertionError(f"the ranks grew by {growths} bytes, and {bounds} were allowed")


def load_memory(*arguments: str) -> list[dict[str, int]]:
    """What benchmarks/load_memory.py finds of each rank."""
    command = [sys.executable, str(ROOT / "benchmarks/load_memory.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    ranks: list[dict[str, int]] = json.loads(result.stdout.splitlines()[-1])["ranks"]
    return ranks
