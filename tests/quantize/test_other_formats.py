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
    "qwen3_moe": {f"self_attn.{part}_proj" for part in "qkvo"}
    | {f"mlp.experts.{number}.{part}_proj" for number in range(4) for part in ("gate", "up", "down")},
    "qwen2": {f"self_attn.{part}_proj" for part in "qkvo"} | {f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def make(kind: str, decoder: str, checkpoint: Make, folder: Path) -> Path:
    is_llama = decoder == "internlm2"
    more = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2} if decoder == "qwen3_moe" else {}
    source = checkpoint("llama" if is_llama else decoder, **SHAPE, **more)
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
        ("original", "qwen3_moe", {}),
        ("text", "qwen3_moe", {"method": "gptq", "format": "compressed-tensors"}),
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
    assert ("mlp.gate" in left_out) == (decoder == "qwen3_moe")
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


def test_experts_with_few_tokens_get_more_and_routers_choose_as_before() -> None:
    """Rows that an expert has not got come by its scores, the highest first; norm times router is exactly what it was."""
    from tests.quantize.layers import awq_recipe, moe_layer
    from vlserve.quantize.experts import FEWEST, NORM, ROUTER, _rows_for, quantize_experts
    from vlserve.quantize.layer import LayerResult

    scores, is_chosen = torch.rand(400), torch.rand(400) < 0.1
    rows = _rows_for(scores, is_chosen)
    own, more = set(is_chosen.nonzero().flatten().tolist()), set(rows.tolist())
    assert own < more and len(rows) == len(more) == FEWEST
    assert min(scores[list(more - own)]) > max(scores[i] for i in range(400) if i not in more)
    assert _rows_for(scores, scores > 0.5).tolist() == (scores > 0.5).nonzero().flatten().tolist()
    assert len(_rows_for(scores[:50], is_chosen[:50])) == 50
    config, stored = moe_layer()
    result = LayerResult()
    tokens = torch.randn(200, config.hidden_size) * torch.linspace(0.1, 30, config.hidden_size)
    quantize_experts(stored, tokens, config, awq_recipe(), result)
    assert len(result.rounded) == 3 * 4 and 0 < result.few_tokens <= 4
    norm, router = result.changed[NORM], result.changed[ROUTER]
    assert not torch.equal(norm, stored[NORM]) and norm.dtype == router.dtype == torch.bfloat16
    assert torch.equal(router.double() * norm.double(), stored[ROUTER].double() * stored[NORM].double())
