"""Language models alone: all decoders, dense and quantised, and pictures refused by name."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.ranks import tp_engine
from tests.engine.reference import ask, engine, prompt
from tests.llm.quantised import Recipe, awq, compressed, fp8, gptq, int8, rewrite
from tests.original_format import make_text
from vlserve import RequestError, VLPipeline
from vlserve.errors import ModelError
from vlserve.llm.config_readers import READERS
from vlserve.models.registry import BUILT_IN
from vlserve.models.text import TEXT
from vlserve.plan.model_shape import read_model_shape

Make = Callable[..., Path]
DECODERS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("llama", {}),
    ("mistral", {"sliding_window": 9}),
    ("phi3", {}),
    ("qwen3_moe", {}),
]
QUESTIONS = ("What shape is it?", "Describe it, please: é 漢字 🙂")


@pytest.mark.parametrize("decoder,settings", DECODERS, ids=str)
def test_greedy_tokens_equal_transformers(decoder: str, settings: dict[str, Any], checkpoint: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_text(checkpoint(decoder, **settings), tmp_path / "model")
    prompts = [prompt(folder, question) for question in QUESTIONS]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = [
        theirs.generate(torch.tensor([p.token_ids]), max_new_tokens=12, do_sample=False)[0, len(p.token_ids) :].tolist()
        for p in prompts
    ]
    assert ask(engine(folder), prompts) == wanted


@pytest.mark.parametrize("decoder", ("internlm2", "internlm3"))
def test_decoders_that_transformers_has_not(decoder: str, checkpoint: Make, tmp_path: Path) -> None:
    """Their arithmetic is a Llama's."""
    source = checkpoint("llama")
    folder = make_text(source, tmp_path / "model", decoder)
    prompts = [prompt(folder, question) for question in QUESTIONS]
    wanted = ask(engine(source), prompts)
    for tp in (1, 2):
        with tp_engine(folder, tp) as (ours, _):
            assert ask(ours, prompts) == wanted


FUSED = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
FORMATS: dict[str, Recipe] = {
    "awq": awq(16),
    "gptq": gptq(16, symmetric=False),
    "gptq act order": gptq(16, desc_act=True),
    "compressed": compressed(16, symmetric=True),
    "fp8 tensor": fp8("tensor"),
    "int8": int8(),
}


BLOCKS = {"fp8 block": fp8("block", (32, 32))}
OTHERS = [("phi3", "awq"), ("qwen2", "awq"), ("qwen3_moe", "gptq"), ("qwen3_moe", "fp8 block")]


@pytest.mark.parametrize("decoder,name", [*(("internlm2", name) for name in FORMATS), *OTHERS])
def test_quantised_as_their_dequantised_weights(decoder: str, name: str, checkpoint: Make, tmp_path: Path) -> None:
    """InternLM2 and Phi-3 store query, key and value as one tensor, which is quantised as one. Ranks share experts out whole."""
    source = checkpoint("llama" if decoder == "internlm2" else decoder, **FUSED)
    dense = make_text(source, tmp_path / "model", decoder if decoder == "internlm2" else None)
    folder, meant = rewrite(dense, tmp_path, (FORMATS | BLOCKS)[name])
    prompts = [prompt(folder, question) for question in QUESTIONS]
    wanted = ask(engine(meant), prompts)
    for tp in (1,) if "act order" in name else (1, 2):
        with tp_engine(folder, tp, expert_parallel=decoder == "qwen3_moe") as (ours, _):
            assert ask(ours, prompts) == wanted


def test_blocks_across_projections_are_refused(checkpoint: Make, tmp_path: Path) -> None:
    dense = make_text(checkpoint("llama", **FUSED), tmp_path / "model", "internlm2")
    folder, _ = rewrite(dense, tmp_path, fp8("block", (16, 32)))
    with pytest.raises(ModelError, match=r"k_proj\.weight_scale_inv: a tensor of shape \[6, 2\] cannot be cut into parts of 96"):
        engine(folder)


def test_every_decoder_is_served_alone() -> None:
    assert {name for name, found in BUILT_IN.items() if found is TEXT} == set(READERS)


def test_pictures_are_refused_by_name(checkpoint: Make, tmp_path: Path) -> None:
    folder = make_text(checkpoint("qwen2"), tmp_path / "model")
    picture = Image.new("RGB", (30, 30))
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]}]
    with VLPipeline(str(folder), device="cpu", dtype="float32", kv_cache_gib=0.01) as pipe:
        for asked in (("What?", picture), messages):
            with pytest.raises(RequestError, match="this model takes no pictures"):
                pipe(asked)
        assert pipe("What?", max_tokens=3, ignore_eos=True).token_ids


def test_qwq_32b_as_published() -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_position_embeddings": 131072,
        "max_window_layers": 64,
        "model_type": "qwen2",
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    shape = read_model_shape(config)
    assert not shape.reasons and not shape.notes and shape.image_tokens == 0 and shape.decoder.section == ""
    assert read_model_shape(json.loads(json.dumps(config)) | {"hidden_act": "gelu"}).reasons == (
        "hidden_act 'gelu' is not supported; supported: silu",
    )
