"""Checkpoints cut in advance: the same parameters and answers, each rank reads its own files only, and faults are named."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_json
from tests.engine.ranks import tp_engine
from tests.engine.reference import add, ask, engine, prompt, run
from tests.engine.test_laws import SAMPLING, Ties
from tests.original_format import make_original, make_text
from tests.vision.test_preprocess import noise
from vlserve import ConfigError, ModelError, VLPipeline
from vlserve.commands.main import main
from vlserve.commands.shard import shard
from vlserve.config import EngineConfig
from vlserve.engine.engine import Engine
from vlserve.engine.loading import build_model, load_model
from vlserve.engine.messages import TokenEvent
from vlserve.llm.shard_writer import OfflineGroup
from vlserve.llm.shards import LIST, read_shards
from vlserve.llm.tensor_parallel import Split
from vlserve.models.base import Model
from vlserve.models.checkpoint import read_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples/plugin_model"
CASES = {
    "tp 1": ("qwen2", 1, {}),
    "tp 2, several files": ("qwen2", 2, {"max_shard": "60KB"}),
    "tp 2, tied": ("llama", 2, {"tie_word_embeddings": True}),
    "tp 2, biases": ("llama", 2, {"attention_bias": True, "mlp_bias": True}),
    "tp 3, vocabulary and width padded": ("qwen3", 3, {"num_key_value_heads": 3, "vocab_size": 341, "intermediate_size": 70}),
    "tp 4, width padded": ("mistral", 4, {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 62}),
    "tp 4, KV heads replicated": ("qwen2", 4, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "tp 2, experts by width": ("qwen3_moe", 2, {"tie_word_embeddings": True}),
    "tp 3, experts whole": ("qwen3_moe", 3, {"num_key_value_heads": 3}),
    "tp 2, one KV head for all": ("qwen3", 2, {"num_attention_heads": 4, "num_key_value_heads": 1}),
}


def is_replicated(case: str) -> bool:
    return "KV head" in case


def cut(model: Path | str, out: Path, tp: int, **options: Any) -> Path:
    shard(EngineConfig(model=str(model), tp=tp, **options), out)
    return out


def load(folder: Path, rank: int, tp: int, dtype: str = "auto", **options: Any) -> Model:
    config = EngineConfig(model=str(folder), tp=tp, dtype=dtype, **options)
    ways = {"replicate_kv_heads": config.replicate_kv_heads, "expert_parallel": config.expert_parallel}
    split = Split(group=OfflineGroup(rank, tp), **ways)
    return load_model(read_checkpoint(folder), config, split, torch.device("cpu"), lambda name, done, total: None)


def is_same(one: Model, other: Model) -> bool:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def answers(ours: Engine, folder: Path) -> list[list[TokenEvent]]:
    pictures = [Image.fromarray(noise(60, 30)), Image.fromarray(noise(20, 90))]
    prompts = [prompt(folder, "What shape is it?", pictures), prompt(folder, "no picture")]
    for i, p in enumerate(prompts):
        add(ours, i, p, SAMPLING, 10)
    events = run(ours)
    return [events[i] for i in range(len(prompts))]


@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_the_original_and_each_rank_has_the_same_parameters(
    case: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    decoder, tp, settings = CASES[case]
    options = {"replicate_kv_heads": is_replicated(case), "expert_parallel": "whole" in case}
    original = checkpoint(decoder, **settings)
    folder = cut(original, tmp_path / "out", tp, **options)
    for rank in range(tp):
        assert is_same(load(folder, rank, tp, **options), load(original, rank, tp, **options))
    want, ties = answers(engine(original), original), Ties()
    if tp == 1:
        got = answers(engine(folder), folder)
    else:
        with tp_engine(folder, tp, **options) as (ours, _):
            got = answers(ours, folder)
    for mine, theirs in zip(got, want, strict=True):
        ties.same(mine, theirs)
    ties.check()


@pytest.mark.parametrize("kind,decoder", [("text", "qwen2"), ("text", "internlm2"), ("original", "phi3")])
def test_other_formats_and_projections_that_are_stored_as_one(
    kind: str, decoder: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    is_llama = decoder == "internlm2"
    make = {"text": make_text, "original": make_original}[kind]
    original = make(checkpoint("llama" if is_llama else decoder), tmp_path / "model", decoder=decoder if is_llama else None)
    (original / "additional_chat_templates").mkdir()
    (original / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    folder = cut(original, tmp_path / "out", 2)
    assert all(is_same(load(folder, rank, 2), load(original, rank, 2)) for rank in range(2))
    assert (folder / "additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    assert not list(folder.glob("*.py")), "vlserve reads none"


def test_two_processes_answer_from_it(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = checkpoint("qwen2")
    folder = cut(original, tmp_path / "out", 2)
    question, picture = "What?", Image.fromarray(noise(60, 30))
    with VLPipeline(str(folder), tp=2, dtype="float32", kv_cache_gib=0.01, device="cpu", threads=1) as pipe:
        got = pipe((question, picture), max_tokens=5)
    with tp_engine(original, 2) as (ours, _):
        assert ask(ours, [prompt(original, question, [picture])], 5) == [list(got.token_ids)]


def test_a_rank_reads_its_own_files_and_every_byte_of_them_once(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = cut(checkpoint("qwen2"), tmp_path / "out", 2)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "rank-0-of-2.safetensors",
        "rank-1-of-2.safetensors",
        "shared.safetensors",
    ]
    (folder / "rank-1-of-2.safetensors").unlink()
    model = load(folder, 0, 2)
    files = [folder / "shared.safetensors", folder / "rank-0-of-2.safetensors"]
    stored = sum(tensor.nbytes for path in files for tensor in load_file(path).values())
    assert model.load(folder, lambda done, total: None) == stored == sum(p.nbytes for p in model.parameters())
    with pytest.raises(ModelError, match=r"rank-1-of-2.safetensors for rank 1"):
        load(folder, 1, 2)


def test_what_is_not_split_is_stored_once(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = cut(checkpoint("qwen2"), tmp_path / "out", 2)
    whole = load_file(checkpoint("qwen2") / "model.safetensors")
    shared, parts = (load_file(folder / f"{name}.safetensors") for name in ("shared", "rank-0-of-2"))
    names = {build_model(read_checkpoint(folder), Split()).rename(name): name for name in whole}
    assert shared.keys() | parts.keys() == names.keys() and not shared.keys() & parts.keys()
    assert all(torch.equal(shared[name], whole[names[name]]) for name in shared)
    encoder = {name for name in names if name.startswith(("vision_tower.", "multi_modal_projector."))}
    assert encoder < shared.keys() and all("norm" in name for name in shared.keys() - encoder)


def test_stored_types_stay_unless_another_is_asked_for(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = shutil.copytree(checkpoint("qwen2"), tmp_path / "original")
    weights = load_file(original / "model.safetensors")
    mixed = {name: tensor.half() if i % 3 else tensor for i, (name, tensor) in enumerate(sorted(weights.items()))}
    save_file(mixed, original / "model.safetensors")
    kept = cut(original, tmp_path / "kept", 2)
    model = build_model(read_checkpoint(kept), Split())
    types = {model.rename(name): tensor.dtype for name, tensor in mixed.items()}
    for path in kept.glob("*.safetensors"):
        assert all(tensor.dtype == types[name] for name, tensor in load_file(path).items()), path
    assert is_same(load(kept, 1, 2), load(original, 1, 2)), "each tensor lies where its type may begin"
    asked = cut(original, tmp_path / "asked", 2, dtype="bfloat16")
    for path in asked.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert read_checkpoint(asked).config["dtype"] == "bfloat16"
    assert is_same(load(asked, 1, 2), load(original, 1, 2, "bfloat16"))


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """Cut for tp 2."""
    return cut(checkpoint("qwen2"), tmp_path / "tp2", 2)


def test_another_degree_is_refused_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("ranks were started, or weights read")

    monkeypatch.setattr("vlserve.pipeline.local.EngineClient", start)
    monkeypatch.setattr("vlserve.engine.loading.build_model", start)
    for options, message in (
        ({"tp": 1}, r"sharded for --tp 2, and this start is --tp 1\. Give --tp 2; .*vlserve shard ORIGINAL OUT --tp 1"),
        ({"tp": 4}, r"sharded for --tp 2, and this start is --tp 4\. Give --tp 2;"),
        ({"tp": 2, "replicate_kv_heads": True}, r"for --tp 2, and this start is --tp 2 --replicate-kv-heads\. Give --tp 2;"),
        ({"tp": 2, "expert_parallel": True}, r"for --tp 2, and this start is --tp 2 --expert-parallel\. Give --tp 2;"),
    ):
        with pytest.raises(ConfigError, match=message):
            VLPipeline(str(folder), **options)
        with pytest.raises(ConfigError, match=message):
            load(folder, 0, **options)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize("decoder,options", [("qwen2", {}), ("qwen3_moe", {"expert_parallel": True})])
def test_the_plan_is_for_the_degree_it_was_cut_for(
    decoder: str, options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut(checkpoint(decoder), tmp_path / "tp2", 2, **options)
    assert main(["plan", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["plan", str(folder), "--json", "--tp", "2", *["--expert-parallel"] * len(options)]) == 0
    assert found["tp"] == 2 and found["ranks"] == json.loads(capsys.readouterr().out)["ranks"]
    assert main(["plan", str(folder), "--tp", "3"]) == 1
    assert "was sharded for --tp 2" in capsys.readouterr().err


def test_loading_is_strict_both_ways(folder: Path) -> None:
    path = folder / "rank-1-of-2.safetensors"
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    before = path.read_bytes()
    changes: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
        (lambda weights: weights.pop(name), f"weights missing from tp2: {name}"),
        (
            lambda weights: weights.update({"vision_tower.more": torch.zeros(1)}),
            r"unexpected weights in tp2: vision_tower.more \(not part",
        ),
        (
            lambda weights: weights.update({name: weights[name][:, 1:].contiguous()}),
            f"{path.name}: {name} is .48, 31., .*.48, 32.",
        ),
        (lambda weights: weights.update({"vision_tower.embeddings.cls_token": torch.zeros(1, 1, 40)}), "given twice"),
    ]
    for change, message in changes:
        path.write_bytes(before)
        edit(path, change)
        load(folder, 0, 2)
        with pytest.raises(ModelError, match=message):
            load(folder, 1, 2)
    path.write_bytes(before[:-1])
    with pytest.raises(ModelError, match=f"{path.name} is damaged"):
        load(folder, 1, 2)


def test_a_damaged_list_of_files_is_named(folder: Path) -> None:
    path = folder / LIST
    before = json.loads(path.read_text())
    for changed, message in (
        ({"format": 2, "vlserve": "9.0"}, r"format 2, written by vlserve 9\.0; this version reads format 1: shard again"),
        (before | {"ranks": before["ranks"][:1]}, "does not list plain file names for each of 2 ranks"),
        (before | {"ranks": [["../x.safetensors"], []]}, "plain file names"),
        (before | {"tp": "two"}, r"Expected `int`, got `str` - at `\$\.tp`; shard again"),
        (before | {"more": 1}, "unknown field `more`"),
        ([], "Expected `object`"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=message):
            VLPipeline(str(folder), tp=2)
        with pytest.raises(ModelError, match=message):
            cut(folder, folder.parent / "again", 2)
    path.write_bytes(b'{"format": 1')
    with pytest.raises(ModelError, match=f"{LIST}: Input data was truncated; shard again"):
        load(folder, 0, 2)


def test_what_cannot_be_done_is_refused_and_leaves_nothing(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model, out = checkpoint("qwen2"), tmp_path / "out"
    for tp, options, message in (
        (4, {}, "tp=4 does not work: num_attention_heads 6 is not divisible by 4"),
        (3, {}, "num_key_value_heads 2 is not divisible by 3"),
        (0, {}, "tp is 0; expected a whole number of 1 or more"),
        (4, {"replicate_kv_heads": True}, "num_attention_heads 6"),
    ):
        with pytest.raises(ConfigError, match=message):
            cut(model, out, tp, **options)
    with pytest.raises(ModelError, match="no such folder"):
        cut(tmp_path / "nowhere", out, 2)
    with pytest.raises(ConfigError, match=r"there is no folder .*above; create it first"):
        cut(model, tmp_path / "above" / "out", 2)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="is sharded for tp 2 already; shard again from the original"):
        cut(cut(model, tmp_path / "first", 2), out, 2)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file exists and is no folder"):
        cut(model, tmp_path / "file", 2)
    with pytest.raises(ConfigError, match="first exists and is not empty; give a new or an empty folder"):
        cut(model, tmp_path / "first", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "first"} and (tmp_path / "file").read_text() == "mine"


def test_a_mount_point_is_refused(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ConfigError, match="is where a disk is mounted; give a folder in it"):
        cut(checkpoint("qwen2"), tmp_path, 2)


def test_a_checkpoint_that_is_not_whole_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = shutil.copytree(checkpoint("qwen2"), tmp_path / "original")
    weights = original / "model.safetensors"
    edit(weights, lambda tensors: tensors.pop("language_model.model.norm.weight"))
    with pytest.raises(ModelError, match=r"weights missing from original: language_model\.model\.norm\.weight"):
        cut(original, tmp_path / "out", 2)
    edit(weights, lambda tensors: tensors.update({"language_model.model.norm.weight": torch.ones(47)}))
    with pytest.raises(ModelError, match=r"norm\.weight is \[47\], config\.json asks for \[48\]"):
        cut(original, tmp_path / "out", 2)
    weights.unlink()
    with pytest.raises(ModelError, match=r"checkpoint file missing: model\.safetensors"):
        cut(original, tmp_path / "out", 2)
    config = json.loads((original / "config.json").read_text())
    edit_json(original / "config.json", text_config=config["text_config"] | {"hidden_act": "gelu"})
    with pytest.raises(ModelError, match="hidden_act 'gelu'"):
        cut(original, tmp_path / "out", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@contextmanager
def _bar_that(act: Callable[[], None]) -> Iterator[Any]:
    """Stands for tqdm's bar; `act` comes after some parts."""

    class Bar:
        num_calls = 0

        def update(self, num_bytes: int) -> None:
            self.num_calls += 1
            if self.num_calls == 20:
                act()

    yield Bar()


@pytest.mark.parametrize(
    "error,seen", [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), ConfigError)], ids=str
)
def test_an_interruption_leaves_nothing(
    error: BaseException,
    seen: type[BaseException],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []

    def interrupt() -> None:
        [partial] = tmp_path.iterdir()
        sizes.extend(path.stat().st_size for path in partial.glob("*.safetensors"))
        raise error

    monkeypatch.setattr("tqdm.tqdm", lambda **_: _bar_that(interrupt))
    with pytest.raises(seen, match="No space left" if seen is ConfigError else None):
        cut(checkpoint("qwen2"), tmp_path / "out", 2)
    assert any(sizes), "files were being written"
    assert not list(tmp_path.iterdir())


def test_the_command_ends_on_a_signal_without_a_trace(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    code = """
import os, sys, tqdm
from vlserve.commands.main import main
def stop(bar, num_bytes):
    os.kill(os.getpid(), int(sys.argv[1]))
tqdm.tqdm.update = stop
sys.exit(main(["shard", *sys.argv[2:]]))
"""
    arguments = [str(int(signal.SIGTERM)), str(checkpoint("qwen2")), "--tp", "2", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_disk_is_asked_before_anything_is_written(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cut(checkpoint("qwen2"), tmp_path / "first", 2)
    needed = sum(path.stat().st_size for path in folder.iterdir() if path.name != LIST)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(needed, 1, needed - 1))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"out will have 0\.00 GiB, and its disk has 0\.00 GiB free; make room"):
        cut(checkpoint("qwen2"), tmp_path / "out", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(needed, 0, needed))  # type: ignore[attr-defined]
    cut(checkpoint("qwen2"), tmp_path / "out", 2)


def test_the_command_says_what_it_wrote_and_how_to_serve_it(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    model = checkpoint("qwen2", num_attention_heads=4)
    out = tmp_path / "out"
    out.mkdir()  # empty ones are taken
    assert main(["shard", str(model), "--tp", "4", str(out), "--replicate-kv-heads"]) == 0
    text = capsys.readouterr().out
    assert f"{out}: 5 weight files for 4 ranks, 0.00 GiB" in text
    assert f"vlserve serve {out} --tp 4 --replicate-kv-heads" in text
    shards = read_shards(out)
    assert shards is not None and (shards.tp, shards.replicate_kv_heads) == (4, True)
    copied = {path.name for path in model.iterdir() if path.suffix != ".safetensors"}
    assert {path.name for path in out.iterdir() if path.suffix != ".safetensors"} == copied | {LIST}
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in copied)
    assert main(["shard", str(model), "--tp", "4", str(tmp_path / "other")]) == 1
    with pytest.raises(SystemExit):
        main(["shard", "--help"])
    assert "example:\n  vlserve shard OpenGVLab" in capsys.readouterr().out


def test_a_model_from_a_package_is_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    from try_it import make_checkpoint

    info = tmp_path / "site" / "llava-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llava\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlserve.models]\nllava = vlserve_llava:LLAVA\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    original = make_checkpoint(tmp_path / "original")
    folder = cut(original, tmp_path / "out", 2)
    for rank in range(2):
        assert is_same(load(folder, rank, 2), load(original, rank, 2))
    with tp_engine(folder, 2) as (ours, _):
        [got, _] = answers(ours, folder)
    ties = Ties()
    ties.same(got, answers(engine(original), original)[0])
    ties.check()
