"""`vlserve quantize` from a checkpoint to a folder: what is written is what was searched, and what broke off goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlserve.quantize.run as run_module
from tests.checkpoints import edit_json
from vlserve import ConfigError, ModelError, VLPipeline
from vlserve.commands.main import main
from vlserve.quantize.layer import LINEARS, LayerResult, quantize_layer
from vlserve.quantize.output_folder import WORK, Output
from vlserve.quantize.run import quantize
from vlserve.quantize.settings import Settings

AWQ_COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7]  # column i of eight is in this nibble
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen2", **SHAPE)


def settings(model: Path, out: Path, **changes: Any) -> Settings:
    return Settings(**{"model": str(model), "out": out, "group_size": 32, "samples": 3, "device": "cpu", **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(names.values())}
    assert sorted(name for file in files.values() for name in file) == sorted(names)
    return {name: files[file][name] for name, file in names.items()}


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] -> [R, 8 C], the lowest first."""
    return torch.stack([(packed.long() >> 4 * i) & 15 for i in range(8)], dim=-1).flatten(1)


def dense(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A linear layer's weight from what is in the file, worked out here again."""
    part = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    if "qweight" in part:
        codes, zeros = (nibbles(part[key]).unflatten(1, (-1, 8))[:, :, AWQ_COLUMNS].flatten(1) for key in ("qweight", "qzeros"))
        group = len(codes) // len(zeros)
        return ((codes - zeros.repeat_interleave(group, 0)) * part["scales"].float().repeat_interleave(group, 0)).T
    if "weight_packed" in part:
        codes, zeros = nibbles(part["weight_packed"]), nibbles(part["weight_zero_point"].T).T
        assert part["weight_shape"].tolist() == list(codes.shape)
        group = codes.shape[1] // zeros.shape[1]
        return (codes - zeros.repeat_interleave(group, 1)) * part["weight_scale"].float().repeat_interleave(group, 1)
    return part["weight"].float() * part["weight_scale"].float()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CASES = [("awq", None), ("awq", "compressed-tensors"), ("gptq", "awq"), ("rtn", None), ("fp8", None)]


@pytest.mark.parametrize("method,form", CASES)
def test_the_files_hold_what_was_searched_and_all_else_as_it_was(
    method: str, form: str | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[LayerResult] = []

    def remember(*arguments: Any) -> LayerResult:
        results.append(quantize_layer(*arguments))
        return results[-1]

    monkeypatch.setattr(run_module, "quantize_layer", remember)
    report = quantize(settings(model, tmp_path / "out", method=method, format=form))
    before, after = load_file(model / "model.safetensors"), weights(tmp_path / "out")
    layers = "language_model.model.layers"
    for index, result in enumerate(results):
        for name in LINEARS:
            full = f"{layers}.{index}.{name}"
            assert torch.equal(dense(after, full), result.rounded[name].dense())
            assert f"{full}.weight" not in after or method == "fp8"
        for name, tensor in result.changed.items():
            assert torch.equal(after.pop(f"{layers}.{index}.{name}"), tensor)
            del before[f"{layers}.{index}.{name}"]
    assert len(results) == 2 and all(bool(result.changed) == (method == "awq") for result in results)
    kept = [name for name in before if not name.removesuffix(".weight").endswith(LINEARS)]
    assert len(kept) > 20 and all(torch.equal(after[name], before[name]) for name in kept)
    copied = {path.name for path in model.iterdir()} - {"model.safetensors", "config.json"}
    assert all((tmp_path / "out" / name).read_bytes() == (model / name).read_bytes() for name in copied)
    config = json.loads((tmp_path / "out/config.json").read_text())
    described = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    if form == "awq" or (form is None and method != "fp8"):
        assert described == {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "modules_to_not_convert": [
                *("multi_modal_projector", "vision_tower", "lm_head"),
                *("model.multi_modal_projector", "model.vision_tower"),
            ],
        }
    else:
        assert described["format"] == ("float-quantized" if method == "fp8" else "pack-quantized")
        assert described["ignore"] == ["re:.*multi_modal_projector.*", "re:.*vision_tower.*", "re:.*lm_head.*"]
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert report["perplexity"]["of"] == "answers" and report["perplexity"]["tokens"] > 0
    assert 0 <= report["accuracy"]["before"] <= report["accuracy"]["tokens_before"] <= 1 and report["accuracy"]["answers"] > 0
    assert all(0 < layer["error"] < 0.5 and 0 < layer["drift"] < 0.5 for layer in report["layers"])
    assert not (tmp_path / "out" / WORK).exists()


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing broke off."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(settings(checkpoint("qwen2", **SHAPE), out))
    return contents(out)


def break_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but the given call of it is broken off when it is half through or about to begin."""
    calls = iter(range(1, 1000))

    def broken(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return broken


PLACES = {
    "in the second layer": (run_module, "quantize_layer", 2),
    "between a layer's file and the state": (Output, "write_state", 2),
    "before the last files": (Output, "finish", 1),
    "while files are moved": (Path, "replace", "model-00002-of-00003.safetensors"),
    "before config.json": (Path, "replace", "config.json"),
    "while the work folder is removed": (Path, "rmdir", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_broke_off_goes_on_to_the_same_files(
    place: str, model: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, when = PLACES[place]
    function = getattr(owner, name)

    def replace(path: Path, target: Path) -> Path:
        if target == tmp_path / "out" / str(when):
            raise KeyboardInterrupt
        return function(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, break_at(when, function) if isinstance(when, int) else replace)
        with pytest.raises(KeyboardInterrupt):
            quantize(settings(model, tmp_path / "out"))
    assert (tmp_path / "out/config.json").exists() == (name == "rmdir")
    if name != "rmdir":
        with pytest.raises(ConfigError, match=r"unfinished work, begun with method 'awq', and this is 'rtn'; give the same"):
            quantize(settings(model, tmp_path / "out", method="rtn"))

    def start(*_: Any) -> Iterator[Any]:
        raise AssertionError("the samples were read again")

    monkeypatch.setattr(run_module, "read_samples", start)
    if name == "rmdir":  # as a kill leaves it
        (tmp_path / "out" / WORK).mkdir()
        (tmp_path / "out" / WORK / "done").touch()
    quantize(settings(model, tmp_path / "out"))
    assert contents(tmp_path / "out") == whole


def test_a_folder_with_files_is_replaced_only_by_force(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "model.safetensors", "model-00002-of-00003.safetensors", "thesis.odt"):
        (out / name).write_text("old")
    with pytest.raises(ConfigError, match=r"out is not empty \(config.json\); give a new or an empty folder, or --force"):
        quantize(settings(model, out))
    assert (out / "model.safetensors").read_text() == "old" and not (out / WORK).exists()
    quantize(settings(model, out, force=True))
    assert contents(out) == whole | {"thesis.odt": b"old"}


def test_a_full_disk_says_whether_the_same_command_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def full(run: Any) -> None:
        raise OSError("No space left")

    monkeypatch.setattr(run_module._Run, "run", full)
    with pytest.raises(ConfigError, match="out could not be written: No space left; make room, or give another folder"):
        quantize(settings(model, out))
    assert not out.exists()

    def full_later(run: Any) -> None:
        (out / WORK / "state.safetensors").touch()
        full(run)

    monkeypatch.setattr(run_module._Run, "run", full_later)
    with pytest.raises(ConfigError, match="make room, and the same command goes on from there"):
        quantize(settings(model, out))
    assert (out / WORK).is_dir()


def test_wrong_options_are_named_and_leave_nothing(model: Path, tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    narrow = checkpoint("qwen2")  # 48 wide
    (tmp_path / "file").write_text("mine")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "int3"}, "method is 'int3'; expected one of awq, gptq, fp8, rtn"),
        ({"method": "fp8", "format": "awq"}, "holds 4-bit weights only; for method 'fp8'"),
        ({"group_size": 100}, "group_size is 100; expected one of 128, 64, 32"),
        ({"samples": 1}, "samples is 1; expected 2 or more"),
        ({"group_size": 64}, r"mlp.down_proj has 96 inputs, no multiple of group_size 64; give --group-size 32"),
        ({"model": str(narrow)}, r"q_proj has 48 inputs, no multiple of group_size 32; only --method fp8 can do it"),
        (
            {"calibration": "chats.jsonl"},
            "calibration 'chats.jsonl': No such file or directory; give generated, text or a JSONL file",
        ),
        ({"out": tmp_path / "above/out"}, "there is no folder .*above; create it first"),
        ({"out": tmp_path / "file"}, "file exists and is no folder"),
        ({"out": model}, "is the model's own folder"),
        ({"model": str(tmp_path / "nowhere")}, "no such folder"),
    ]
    for changes, message in wrong:
        with pytest.raises((ConfigError, ModelError), match=message):
            quantize(settings(**{"model": model, "out": out, **changes}))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_quantised_or_damaged_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    edit_json(copy / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ConfigError, match=r"config.json has a quantization_config: it is quantised already"):
        quantize(settings(copy, tmp_path / "out"))
    edit_json(copy / "config.json", quantization_config=None)
    tensors = load_file(copy / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"layer 1: the inputs of mlp.down_proj hold NaN or infinity"):
        quantize(settings(copy, tmp_path / "out"))
    save_file(tensors | {"x.qweight": torch.zeros(1)}, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model.safetensors has x.qweight: it is quantised already"):
        quantize(settings(copy, tmp_path / "other"))
    del tensors[name]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelError, match="weights missing from copy: " + name):
        quantize(settings(copy, tmp_path / "other"))


def test_on_the_demo_awq_keeps_more_than_rounding(tmp_path: Path) -> None:
    reports = {
        method: quantize(Settings(model="demo", out=tmp_path / method, method=method, samples=16, device="cpu"))
        for method in ("rtn", "awq")
    }
    rtn, awq = reports["rtn"], reports["awq"]
    assert rtn["perplexity"]["before"] == awq["perplexity"]["before"] < 6, "the demo knows such pictures and questions"
    assert awq["perplexity"]["after"] < 1.5 * awq["perplexity"]["before"]
    for plain, searched in zip(rtn["layers"], awq["layers"], strict=True):
        assert searched["error"] < plain["error"]


def test_its_accuracy_is_that_of_greedy_answers(tmp_path: Path) -> None:
    """Of the three answers held out, the model's own word for word, the same and a word more, and half of it."""
    picture = str(Path(__file__).parents[2] / "examples/pictures/shapes.png")
    questions = [("What do you see?", picture)] * 8 + [("Hello!", [])] * 8 + [("Is there a circle?", picture)] * 8
    with VLPipeline(kv_cache_gib=0.1) as pipe:
        whole, longer, shorter = (pipe(questions[i], max_tokens=60).text for i in (7, 15, 23))
    answers = [whole] * 15 + [longer + " Yes."] + [shorter] * 7 + [shorter[: len(shorter) // 2]]
    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for (text, image), answer in zip(questions, answers, strict=True):
            parts = [{"type": "text", "text": text}, *([{"type": "image", "image": image}] if image else [])]
            asked = {"role": "user", "content": parts}
            print(json.dumps({"messages": [asked, {"role": "assistant", "content": answer}]}), file=file)
    model = Settings(model="demo", out=tmp_path / "out", method="fp8", samples=24, calibration=str(chats), device="cpu")
    accuracy = quantize(model)["accuracy"]
    assert accuracy["answers"] == 3 and accuracy["before"] == pytest.approx(1 / 3), accuracy
    assert 0.5 < accuracy["tokens_before"] < 1


def test_the_command_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", "demo", str(out), "--samples", "4", "--calibration", "text", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "held-out tokens of answers" in said and "before" in said and f"serve it with: vlserve serve {out}" in said
    assert main(["quantize", "demo", str(out)]) == 1 and "is not empty" in capsys.readouterr().err
