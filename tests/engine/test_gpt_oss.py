"""GPT-OSS alone and under InternVL, in each form that it is published in, on ranks that share experts in either way."""

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
from tests.llm.mxfp4 import to_mxfp4
from tests.original_format import make_original, make_text
from tests.vision.test_preprocess import noise
from vlserve.errors import ModelError
from vlserve.kernels.experts.types import Mxfp4Experts
from vlserve.llm.experts import Experts

Make = Callable[..., Path]
QUESTIONS = ("What shape is it?", "Describe it, please: é 漢字 🙂", "word " * 20)
RANKS = {"num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folders(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model: as published with MXFP4, and with the numbers that this stands for; alone."""
    base = tmp_path_factory.mktemp("gpt-oss")
    text = make_text(checkpoint("gpt_oss", **RANKS), base / "text")
    return {"packed": to_mxfp4(text, base / "packed", dense=False), "dense": to_mxfp4(text, base / "dense", dense=True)}


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> list[list[int]]:
    """By transformers."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folders["dense"], dtype=torch.float32)
    assert type(theirs).__name__ == "GptOssForCausalLM"
    return [
        theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        for ids in (prompt(folders["dense"], question).token_ids for question in QUESTIONS)
    ]


@pytest.mark.parametrize(
    "form,options",
    [
        ("dense", {}),
        ("packed", {}),
        ("packed", {"tp": 2}),
        ("packed", {"tp": 4, "replicate_kv_heads": True}),
        ("dense", {"tp": 2, "expert_parallel": True}),
    ],
    ids=str,
)
def test_greedy_tokens_equal_transformers(
    form: str, options: dict[str, Any], folders: dict[str, Path], wanted: list[list[int]]
) -> None:
    """Experts have three groups of MXFP4: two ranks have two and one, four have one each but the last."""
    prompts = [prompt(folders[form], question) for question in QUESTIONS]
    if not options:
        assert ask(engine(folders[form]), prompts) == wanted
        return
    with tp_engine(folders[form], **options) as (ours, _):
        assert ask(ours, prompts) == wanted


def test_opengvlabs_format(checkpoint: Make, tmp_path: Path) -> None:
    """The same weights under other names: the same tokens. Its conversation has ends of its own."""
    source = checkpoint("gpt_oss")
    folder = make_original(source, tmp_path / "model", template="internvl3_5_gpt_oss")
    template = json.loads((source / "processor_config.json").read_text()).get("chat_template")
    (folder / "chat_template.jinja").write_text(template or (source / "chat_template.jinja").read_text())
    picture = Image.fromarray(noise(40, 30))
    wanted, got = (
        ask(engine(where), [prompt(where, QUESTIONS[0], images) for images in ([], [picture])], ignore_eos=True)
        for where in (source, folder)
    )
    names = engine(source).runner.model.rename("model.language_model.layers.0.mlp.experts.down_proj_bias")
    assert not isinstance(names, str) and names is not None
    assert names[1].name == "language_model.model.layers.0.mlp.experts.1.down_proj.bias", "as some savers call it"
    assert got[0] == wanted[0]  # pictures are resized in another way
    assert len(got[1]) == len(wanted[1])


def test_mxfp4_is_kept_in_four_bits_and_read_strictly(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = engine(folders["packed"])
    experts = ours.runner.model.decoder.decoder_layers[0].feed_forward
    assert isinstance(experts, Experts) and isinstance(experts.down.weights, Mxfp4Experts)
    assert experts.down.packed_bytes == 8 * 64 * 3 * (16 + 1) + 8 * 64 * 4, "codes, scales and float32 biases"
    stored = load_file(folders["packed"] / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    for tensor, message in (
        (stored[name][:7], "none of 8 experts"),
        (stored[name][:, :, :2], "MXFP4 needs U8"),
        (None, "missing"),
    ):
        folder = tmp_path / message.split()[0]
        shutil.copytree(folders["packed"], folder)
        changed = {**stored, name: tensor} if tensor is not None else {n: t for n, t in stored.items() if n != name}
        save_file({n: t.contiguous() for n, t in changed.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=message):
            engine(folder)


def test_experts_are_of_weight_in_these_tests(checkpoint: Make, tmp_path: Path) -> None:
    """Without them the answers are others."""
    for decoder in ("qwen3_moe", "gpt_oss"):
        folder = checkpoint(decoder)
        prompts = [prompt(folder, question) for question in QUESTIONS]
        other = shutil.copytree(folder, tmp_path / decoder)
        for path in other.glob("*.safetensors"):
            tensors = {name: tensor * (".experts." not in name) for name, tensor in load_file(path).items()}
            save_file(tensors, path, metadata={"format": "pt"})
        answers, without = ask(engine(folder), prompts), ask(engine(other), prompts)
        assert all(one != two for one, two in zip(answers, without, strict=True))
