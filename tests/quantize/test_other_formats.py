"""Checkpoints in OpenGVLab's format, projections that are stored as one, and language models alone, as others publish them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.engine.ranks import tp_engine
from tests.engine.reference import ask, engine, prompt
from tests.llm.quantised import LINEAR
from tests.original_format import make_original, make_text
from tests.quantize.test_quantize import SHAPE, dense, settings, weights
from tests.vision.test_preprocess import noise
from vlserve.quantize.run import quantize

Make = Callable[..., Path]
NAMES = {
    "internlm2": {"attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "qwen2": {f"self_attn.{part}_proj" for part in "qkvo"} | {f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def make(kind: str, decoder: str, checkpoint: Make, folder: Path) -> Path:
    is_llama = decoder == "internlm2"
    source = checkpoint("llama" if is_llama else decoder, **SHAPE, **({"attention_bias": True} if decoder == "llama" else {}))
    made = {"original": make_original, "text": make_text}[kind](source, folder, decoder=decoder if is_llama else None)
    if kind == "text":
        shutil.rmtree(made / "additional_chat_templates", ignore_errors=True)
        (made / "additional_chat_templates").mkdir()
        (made / "additional_chat_templates/tool_use.jinja").write_text((made / "chat_template.jinja").read_text())
    return made


def meant_by(model: Path, out: Path, folder: Path) -> Path:
    """`model` with the weights that those of `out` stand for."""
    shutil.copytree(model, folder)
    before, after = load_file(model / "model.safetensors"), weights(out)
    for name in before:
        if name in after and after[name].dtype == before[name].dtype:
            before[name] = after[name]
        else:
            assert LINEAR.fullmatch(name), name
            before[name] = dense(after, name.removesuffix(".weight")).contiguous()
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "kind,decoder,options",
    [
        ("original", "internlm2", {}),
        ("original", "internlm2", {"method": "fp8"}),
        ("original", "phi3", {"method": "gptq", "format": "compressed-tensors"}),
        ("text", "internlm2", {"method": "rtn"}),
        ("text", "qwen2", {}),
    ],
    ids=str,
)
def test_what_is_written_is_served(kind: str, decoder: str, options: dict[str, Any], checkpoint: Make, tmp_path: Path) -> None:
    model, out = make(kind, decoder, checkpoint, tmp_path / "model"), tmp_path / "out"
    report = quantize(settings(model, out, samples=2, **options))
    assert report["calibration"] == ("text" if kind == "text" else "generated")
    assert all(0 < layer["error"] < 0.5 for layer in report["layers"])
    written, front = weights(out), {"original": "language_model.", "text": ""}[kind]
    layer = f"{front}model.layers.1."
    last = {"compressed-tensors": ".weight_packed"}.get(options.get("format", ""), ".qweight")
    last = ".weight_scale" if options.get("method") == "fp8" else last
    names = {name.removeprefix(layer).removesuffix(last) for name in written if name.startswith(layer) and name.endswith(last)}
    assert names == NAMES[decoder]
    config = json.loads((out / "config.json").read_text())
    head = "output" if decoder == "internlm2" else "lm_head"
    left_out = json.dumps(
        config["quantization_config"].get("modules_to_not_convert", config["quantization_config"].get("ignore"))
    )
    assert head in left_out and ("mlp1" in left_out) == (kind == "original")
    assert ("auto_map" in config) == (kind == "original") == (out / "modeling_internvl_chat.py").exists()
    assert (out / "additional_chat_templates/tool_use.jinja").exists() == (kind == "text")
    pictures = [Image.fromarray(noise(60, 30))] if kind == "original" else []
    prompts = [prompt(model, "What shape is it?", pictures), prompt(model, "Hello!")]
    wanted = ask(engine(meant_by(model, out, tmp_path / "meant")), prompts, 6)
    for tp in (1, 2):
        with tp_engine(out, tp) as (ours, _):
            assert ask(ours, prompts, 6) == wanted


def test_code_that_is_not_there_is_not_named(checkpoint: Make, tmp_path: Path) -> None:
    """As the Hub's download leaves it."""
    model = make("original", "qwen2", checkpoint, tmp_path / "model")
    for path in model.glob("*.py"):
        path.unlink()
    quantize(settings(model, tmp_path / "out", samples=2, method="fp8"))
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())
    assert torch.equal(
        weights(tmp_path / "out")["vision_model.embeddings.class_embedding"],
        load_file(model / "model.safetensors")["vision_model.embeddings.class_embedding"],
    )
