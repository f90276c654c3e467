"""What people point at by mistake: said in one line with the way out, before a rank starts; what transformers loads, loads."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_settled_config import edit, load, store
from vlserve.commands.main import main
from vlserve.errors import ModelError, VLServeError
from vlserve.models.checkpoint import find_folder, read_checkpoint

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 11421896\n"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(checkpoint("qwen2"), tmp_path / "model")
    return tmp_path / "model"


def clear(folder: Path, *new: tuple[str, str]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, text in new:
        (folder / name).write_text(text)


def cut(folder: Path) -> None:
    """Into two shards with an index, as transformers saves them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in tensors if where[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def down(folder: Path) -> None:
    below = folder / "snapshots" / "0d1fd94"
    below.mkdir(parents=True)
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(below / path.name)


def only_other_weights(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name) and None  # type: ignore[func-returns-value]


ADAPTER = json.dumps({"base_model_name_or_path": "OpenGVLab/InternVL3-1B-hf", "peft_type": "LORA", "r": 8})
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights are a pointer": (
        lambda folder: (folder / "model.safetensors").write_text(POINTER),
        "model.safetensors: git-LFS pointers, not the files themselves. Run `git lfs pull`",
    ),
    "two files are pointers": (
        lambda folder: [cut(folder), (folder / SHARDS[1]).write_text(POINTER), (folder / "tokenizer.json").write_text(POINTER)],
        f"{SHARDS[1]}, tokenizer.json: git-LFS pointers",
    ),
    "config.json is a pointer": (
        lambda folder: (folder / "config.json").write_text(POINTER),
        "config.json: git-LFS pointers",
    ),
    "adapter": (
        lambda folder: clear(folder, ("adapter_config.json", ADAPTER), ("adapter_model.safetensors", "")),
        "is an adapter (LoRA) for OpenGVLab/InternVL3-1B-hf, not a model.*merge_and_unload",
    ),
    "adapter with a config.json": (
        lambda folder: [(folder / "model.safetensors").unlink(), (folder / "adapter_config.json").write_text("{}")],
        "is an adapter (LoRA) for another model",
    ),
    "gguf": (lambda folder: clear(folder, ("m-Q4_K_M.gguf", "GGUF")), "m-Q4_K_M.gguf. GGUF is llama.cpp's format"),
    "gguf with a config.json": (only_other_weights("m-Q8_0.gguf"), "m-Q8_0.gguf: GGUF is llama.cpp's format"),
    "bin": (
        only_other_weights("pytorch_model.bin"),
        "there is pytorch_model.bin, and only safetensors.*save_pretrained",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "Only safetensors are read; download the weights"),
    "one level too high": (down, "Folders below it have one; give .*/model/snapshots/0d1fd94"),
    "one level too deep": (
        lambda folder: [
            (folder / "old").mkdir(),
            *(path.rename(folder / "old" / path.name) for path in list(folder.iterdir()) if path.name == "tokenizer.json"),
        ],
        "The folder above has one; give .*/model$",
    ),
    "empty": (clear, "is empty; give the folder that has config.json"),
    "something else": (
        lambda folder: clear(folder, ("notes.txt", "")),
        "there is notes.txt. Give the folder that has",
    ),
    "a shard is missing": (
        lambda folder: [cut(folder), (folder / SHARDS[1]).unlink()],
        f"checkpoint file missing: {SHARDS[1]} in .*, which {INDEX} names; download",
    ),
    "no index": (
        lambda folder: [cut(folder), (folder / INDEX).unlink()],
        f"there is {SHARDS[0]}, {SHARDS[1]}, but no {INDEX}",
    ),
    "an index that is none": (lambda folder: (folder / INDEX).write_text("{}"), "is no JSON object with a weight_map.*again"),
    "half a file": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors is damaged or no safetensors file: it has .* bytes, and .* goes up to .*; download it again",
    ),
    "a page of the web": (
        lambda folder: (folder / "config.json").write_text("<!DOCTYPE html>"),
        "config.json: not valid JSON: .*; download or write it again",
    ),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected a JSON object"),
}

PLANNED = (
    "weights are a pointer",
    "two files are pointers",
    "adapter with a config.json",
    "gguf with a config.json",
    "bin",
    "no weights",
    "a shard is missing",
    "no index",
)
PLANNED += ("an index that is none", "half a file")  # the weights are not needed


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_the_way_out(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = MISTAKES[name]
    make(folder)
    given = folder / "old" if name == "one level too deep" else folder
    pattern = message.replace("(LoRA)", r"\(LoRA\)")
    with pytest.raises(ModelError, match=pattern):
        read_checkpoint(find_folder(str(given)))
    status = main(["plan", str(given)])
    assert (status == 0) == (name in PLANNED)
    shown = capsys.readouterr()
    assert status == 0 or shown.err.startswith("vlserve: error: ")
    if status == 0:
        says_so = re.search(rf"cannot serve this model yet:\n  .*{pattern}.*\n\n", shown.out)
        assert bool(says_so) == (name != "no weights")  # where none were downloaded, the plan is of config.json


@pytest.mark.parametrize(
    "file,message",
    [
        ("config.json", r"config.json is a file; give the folder that has config.json and the weights: .*/model$"),
        ("model.safetensors", "model.safetensors is a file; give the folder"),
        ("m-Q4_K_M.gguf", "GGUF is llama.cpp's format and is not read"),
    ],
)
def test_a_file_is_no_model(file: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "m-Q4_K_M.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(VLServeError, match=message):
        find_folder(str(folder / file))
    assert main(["plan", str(folder / file)]) == (0 if file == "config.json" else 1)
    assert "JSON" not in capsys.readouterr().err


@pytest.mark.parametrize("place", ["one file", "a shard, not in the index", "a shard, in the index", "a file beside"])
def test_what_belongs_to_no_part_is_passed_over_and_said(place: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = load(folder).state_dict()
    extra = {"v_head.summary.weight": torch.ones(1, 48)}  # of a fine-tune with a value head
    if place == "one file":
        store(folder, load_file(folder / "model.safetensors") | extra)
    else:
        cut(folder)
        if place == "a file beside":
            save_file(extra, folder / "value_head.safetensors")
        else:
            save_file(load_file(folder / SHARDS[0]) | extra, folder / SHARDS[0])
        if place == "a shard, in the index":
            index = json.loads((folder / INDEX).read_text())
            index["weight_map"]["v_head.summary.weight"] = SHARDS[0]
            (folder / INDEX).write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING):
        got = load(folder).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert ("not part of this model and not used: v_head.summary.weight" in caplog.text) == (place != "a file beside")


def test_what_tells_another_model_stays_an_error(folder: Path) -> None:
    """transformers loads it and answers otherwise than the model that was trained."""
    tensors = load_file(folder / "model.safetensors")
    store(folder, tensors | {"language_model.model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(ModelError, match="q_norm.weight .not part of this architecture"):
        load(folder)


ODD: list[tuple[str, str, Any, str]] = [
    ("text_config", "rms_norm_eps", "x", "text_config.rms_norm_eps is 'x'; expected a number above 0"),
    ("text_config", "num_attention_heads", 0, "num_attention_heads is 0; expected"),
    ("text_config", "num_hidden_layers", -1, "num_hidden_layers is -1; expected"),
    ("text_config", "num_key_value_heads", 0, "num_key_value_heads is 0; expected"),
    ("vision_config", "patch_size", 0, "vision_config.patch_size is 0; expected a positive integer"),
    ("vision_config", "patch_size", "14", "vision_config.patch_size is '14'; expected a positive integer"),
    ("vision_config", "image_size", [28, 27], r"vision_config.image_size \[28, 27\] is not square"),
    ("vision_config", "image_size", [], r"vision_config.image_size \[\] is not square"),
    ("vision_config", "num_attention_heads", 0, "vision_config.num_attention_heads is 0; expected a positive integer"),
    ("vision_config", "num_attention_heads", 7, "vision_config.hidden_size 40 is no multiple of num_attention_heads 7"),
    ("vision_config", "num_hidden_layers", -1, "vision_config.num_hidden_layers is -1; expected a positive integer"),
    ("vision_config", "hidden_size", "x", "vision_config.hidden_size is 'x'; expected a positive integer"),
    ("vision_config", "layer_norm_eps", "x", "vision_config.layer_norm_eps is 'x'; expected a number above 0"),
    ("", "downsample_ratio", 0, "downsample_ratio is 0; expected a number above 0"),
    ("", "downsample_ratio", "x", "downsample_ratio is 'x'; expected a number above 0"),
    ("", "text_config", None, "text_config is None; expected an object"),
    ("", "text_config", [1], r"text_config is \[1\]; expected an object"),
    ("", "vision_config", None, "config.json has no vision_config"),
    ("", "model_type", None, "config.json has no model_type.*supported: .*internvl"),
    ("", "dtype", "int8", "config.json's dtype 'int8' is not supported; give dtype=float32, bfloat16, float16"),
]


@pytest.mark.parametrize("section,key,value,message", ODD, ids=str)
def test_an_odd_value_is_named_in_the_front(section: str, key: str, value: Any, message: str, folder: Path) -> None:
    from vlserve.plan.tp_plan import choose_dtype

    edit(folder, lambda config: (config[section] if section else config).update({key: value}))
    with pytest.raises(ModelError, match=message):
        choose_dtype(read_checkpoint(folder).config, "auto")


def test_null_is_a_default(folder: Path) -> None:
    """As published files have it: null is not a value of its own, but for a window and the number of KV heads."""
    wanted = load(folder).decoder.config

    def set_nulls(config: dict[str, Any]) -> None:
        config |= dict.fromkeys(("architectures", "vision_feature_layer", "vision_feature_select_strategy", "dtype"))
        config |= dict.fromkeys(("projector_hidden_act", "downsample_ratio", "tie_word_embeddings", "torch_dtype"))
        names = ("rms_norm_eps", "hidden_act", "rope_scaling", "attention_bias", "head_dim", "layer_types", "sliding_window")
        config["text_config"] |= dict.fromkeys(
            (*names, "use_sliding_window", "max_window_layers", "tie_word_embeddings", "rope_theta")
        )
        names = ("hidden_act", "norm_type", "use_mean_pooling", "use_absolute_position_embeddings", "num_channels")
        config["vision_config"] |= dict.fromkeys((*names, "use_mask_token", "layer_norm_eps"))

    edit(folder, set_nulls)
    assert load(folder).decoder.config == wanted


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_missing_sizes_are_transformers(model_type: str) -> None:
    from transformers import CONFIG_MAPPING, InternVLConfig, InternVLVisionConfig

    from vlserve.llm.config_readers import read_decoder_config
    from vlserve.vision.config import DEFAULTS, OUTER_DEFAULTS, read_encoder_config

    theirs = CONFIG_MAPPING[model_type]()
    for text in ({}, {"num_key_value_heads": None}):
        ours, theirs = read_decoder_config({"model_type": model_type, **text}), CONFIG_MAPPING[model_type](**text)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"):
            assert getattr(ours, key) == getattr(theirs, key), key
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.num_key_value_heads == (theirs.num_key_value_heads or theirs.num_attention_heads)
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        if model_type == "mistral":  # null is refused there
            break
    vision, outer = InternVLVisionConfig(), InternVLConfig()
    assert all(getattr(outer, key) == value for key, value in OUTER_DEFAULTS.items())
    encoder = read_encoder_config({"vision_config": {}})
    assert (encoder.image_size, encoder.patch_size) == (vision.image_size[0], vision.patch_size[0])
    for key in set(DEFAULTS) - {"image_size", "patch_size"}:
        assert getattr(encoder, key) == getattr(vision, key), key
