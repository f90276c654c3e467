"""A vision model without its tower: the same answers to texts, and nothing of the encoder is needed, read or planned."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_json
from tests.engine.ranks import tp_engine
from tests.engine.reference import ask, engine, prompt
from tests.models.toy_family import TOY, make_toy
from tests.original_format import make_original, make_text
from tests.prompt.test_build import copy_of
from tests.qwen_vl import KINDS as QWEN_VL
from tests.test_structure import loaded_by
from vlserve import ConfigError, ModelError, RequestError
from vlserve.commands.main import main
from vlserve.commands.shard import shard
from vlserve.config import EngineConfig, MediaConfig
from vlserve.engine import rendezvous
from vlserve.engine.memory import weight_bytes
from vlserve.media.loader import PictureLoader
from vlserve.models import registry
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.registry import BUILT_IN, find_architecture
from vlserve.plan.tp_plan import make_plan
from vlserve.prompt.build import PromptBuilder
from vlserve.prompt.chat_messages import ImagePart
from vlserve.prompt.conversation import Message, Text

Make = Callable[..., Path]
ALONE: dict[str, Any] = {"language_model_only": True}
QUESTIONS = ("What shape is it?", "<img>Describe</img> it, please: é 漢字 🙂")


@pytest.fixture(params=["internvl", "internvl_chat", "qwen3_vl"])
def whole(request: pytest.FixtureRequest, checkpoint: Make, tmp_path: Path) -> Path:
    if request.param in QWEN_VL:
        return checkpoint(request.param)
    source = checkpoint("qwen3", num_hidden_layers=2)
    return source if request.param == "internvl" else make_original(source, tmp_path / "original")


def without_vision(whole: Path, tmp_path: Path) -> Path:
    """A copy that lacks all that pictures need, or has it spoilt."""
    (tmp_path / "without").mkdir()
    folder = copy_of(whole, tmp_path / "without")
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(path).items() if "language_model." in name or "lm_head" in name}
        save_file(tensors, path, metadata={"format": "pt"})
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    edit_json(folder / "config.json", vision_config={"hidden_act": "none of ours", "norm_type": 3}, select_layer="?")
    return folder


def test_texts_are_answered_as_with_the_tower(whole: Path, tmp_path: Path) -> None:
    folder = without_vision(whole, tmp_path)
    prompts = [prompt(whole, question) for question in QUESTIONS]
    with_tower = engine(whole)
    wanted = ask(with_tower, prompts)
    for given in (whole, folder):
        alone = read_checkpoint(given, **ALONE)
        assert alone.end_token_ids == read_checkpoint(whole).end_token_ids and not alone.preprocessor.placeholders()
        for tp in (1, 2):
            with tp_engine(given, tp, **ALONE) as (ours, runners):
                assert ask(ours, prompts) == wanted
                assert ours.runner.model.tower is None and not any(r.device_bytes()["vision_cache"] for r in runners)
    sizes, full = weight_bytes(ours.runner.model), weight_bytes(with_tower.runner.model)
    assert sizes["vision"] == 0 and full["vision"] > 0
    plan = make_plan(json.loads((folder / "config.json").read_text()), tp=2, dtype="float32", **ALONE)
    rank = plan.ranks[0]
    assert (rank.vision_bytes, rank.decoder_bytes, rank.embedding_bytes) == tuple(sizes.values())
    assert rank.feature_bytes == 0 and plan.image_tokens == 0 and plan.supported and not plan.notes
    with pytest.raises(ModelError):
        read_checkpoint(folder)


def test_pictures_are_refused_by_name_and_prompts_are_the_same(checkpoint: Make, tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 30))
    for whole in (checkpoint("qwen3"), make_original(checkpoint("qwen3"), tmp_path / "original")):
        alone = read_checkpoint(whole, **ALONE)
        loader = PictureLoader(MediaConfig())
        with pytest.raises(RequestError, match="this model takes no pictures"):
            asyncio.run(loader.load([ImagePart(source=picture, param="messages[0]", local=True)], alone.preprocessor))
        loader.close()
        for question in QUESTIONS:
            built = PromptBuilder(alone).build([Message("user", [Text(question)])])
            assert built.token_ids == prompt(whole, question).token_ids


def test_shards_are_served_without_the_tower_in_them(checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is it said that there is something which fills nothing."""
    folder = checkpoint("qwen3", num_hidden_layers=2)
    shard(EngineConfig(model=str(folder), tp=2), tmp_path / "shards")
    prompts = [prompt(folder, question) for question in QUESTIONS]
    with tp_engine(tmp_path / "shards", 2, **ALONE) as (ours, _):
        assert ask(ours, prompts) == ask(engine(folder), prompts) == ask(engine(folder, **ALONE), prompts)
    assert "not used" not in caplog.text


def test_a_decoder_alone_is_served_as_ever(checkpoint: Make, tmp_path: Path) -> None:
    folder = make_text(checkpoint("qwen3", num_hidden_layers=2), tmp_path / "text")
    prompts = [prompt(folder, question) for question in QUESTIONS]
    assert ask(engine(folder, **ALONE), prompts) == ask(engine(folder), prompts)
    config = json.loads((folder / "config.json").read_text())
    assert make_plan(config, tp=1, **ALONE) == make_plan(config, tp=1)
    assert make_plan(config, tp=1).ranks[0].feature_bytes == 0


def test_every_built_in_family_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package's family that cannot is refused by its name."""
    for model_type in BUILT_IN:
        find_architecture({"model_type": model_type}, **ALONE)
    monkeypatch.setitem(registry.BUILT_IN, "toy", replace(TOY, origin="toys 1.0"))
    message = "language_model_only: toys 1.0 does not serve model_type 'toy' without its encoder"
    with pytest.raises(ModelError, match=message):
        read_checkpoint(make_toy(tmp_path, ["full_attention"]), **ALONE)


def test_the_command_plans_without_the_encoder(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(whole), "--tp", "1", "--json", "--language-model-only"]) == 0
    (rank,) = json.loads(capsys.readouterr().out)["ranks"]
    assert rank["vision_bytes"] == rank["feature_bytes"] == 0
    assert main(["plan", str(whole), "--language-model-only"]) == 0
    assert "encoder" not in capsys.readouterr().out


def test_the_plan_of_a_text_model_needs_no_torch(checkpoint: Make, tmp_path: Path) -> None:
    folder = make_text(checkpoint("qwen3", num_hidden_layers=2), tmp_path / "text")
    code = f"from vlserve.commands.main import main; main(['plan', {str(folder)!r}, '--tp', '1'])"
    assert "torch" not in loaded_by(code)


def test_machines_agree_on_it() -> None:
    configs = (EngineConfig(tp=2, nnodes=2, rdzv_endpoint="localhost:1", language_model_only=one) for one in (False, True))
    one, other = map(rendezvous._identity, configs)
    assert {name for name in one if one[name] != other[name]} == {"language_model_only"}
    with pytest.raises(ConfigError, match="language_model_only is 'yes'; expected true or false"):
        EngineConfig(language_model_only="yes")  # type: ignore[arg-type]
