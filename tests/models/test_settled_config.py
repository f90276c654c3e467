"""What config.json leaves open or says against the weights: the head, the type, the text's model_type; as transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlserve.commands.main import main
from vlserve.config import EngineConfig
from vlserve.engine.loading import load_model
from vlserve.errors import ModelError
from vlserve.llm.tensor_parallel import Split
from vlserve.models.base import Model
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.settled_config import read_stored
from vlserve.plan.tp_plan import make_plan

FLAGS = (None, True, False)  # None: not in the file
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
Change = Callable[[dict[str, Any]], object]


def edit(folder: Path, change: Change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def set_flag(place: dict[str, Any], key: str, value: Any) -> None:
    place.pop(key, None)
    if value is not None:
        place[key] = value


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> Model:
    config = EngineConfig(model=str(folder), dtype="float32")
    return load_model(read_checkpoint(folder), config, Split(), torch.device("cpu"), lambda name, done, total: None)


def head(model: Model) -> torch.Tensor:
    table = model.decoder.lm_head or model.decoder.embed_tokens
    return table.weight.data[: model.decoder.config.vocab_size]


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(checkpoint("qwen2"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("stored", ["own", "none", "equal"])
def test_the_head_is_transformers_for_every_flag(stored: str, folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    tensors = load_file(folder / "model.safetensors")
    if stored == "none":
        del tensors[HEAD]
    if stored == "equal":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    store(folder, tensors)
    for outer, text in product(FLAGS, FLAGS):
        edit(folder, lambda config, outer=outer: set_flag(config, "tie_word_embeddings", outer))  # type: ignore[misc]
        edit(folder, lambda config, text=text: set_flag(config["text_config"], "tie_word_embeddings", text))  # type: ignore[misc]
        theirs, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        plan = make_plan(json.loads((folder / "config.json").read_text()), tp=1, stored=read_stored(folder))
        if info["missing_keys"]:  # transformers makes random numbers
            assert (stored, outer, plan.supported) == ("none", False, False)
            with pytest.raises(ModelError, match='no head.*set "tie_word_embeddings": true at the top level of config.json'):
                read_checkpoint(folder)
            continue
        ours = load(folder)
        assert torch.equal(head(ours), theirs.lm_head.weight), (outer, text)
        is_tied = theirs.lm_head.weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()
        assert (ours.decoder.lm_head is None) == is_tied
        table = 48 * 4 * ours.decoder.config.vocab_size
        assert plan.supported and plan.ranks[0].embedding_bytes == (1 if is_tied else 2) * table


def test_a_head_that_is_stored_beside_a_tied_embedding_is_not_lost_in_shards(folder: Path, tmp_path: Path) -> None:
    edit(folder, lambda config: config.update(tie_word_embeddings=True))
    assert main(["shard", str(folder), str(tmp_path / "cut"), "--tp", "1"]) == 0
    assert torch.equal(head(load(tmp_path / "cut")), load_file(folder / "model.safetensors")[HEAD])


@pytest.mark.parametrize(
    "outer,text,stored,wanted",
    [
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, torch.bfloat16, "bfloat16"),  # InternVL3-8B-hf
        ({}, {"dtype": "bfloat16"}, torch.bfloat16, "bfloat16"),  # Qwen3-VL
        ({"dtype": "torch.bfloat16"}, {}, torch.float32, "bfloat16"),
        ({}, {"torch_dtype": "float16"}, torch.float32, "float16"),
        ({"torch_dtype": None, "dtype": None}, {"dtype": "bfloat16"}, torch.float32, "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, {"dtype": "float32"}, torch.bfloat16, "float16"),
        ({}, {}, torch.bfloat16, "bfloat16"),  # gpt-oss
        ({}, {}, torch.float16, "float16"),
        ({}, {}, torch.float32, "float32"),
        ({"torch_dtype": "auto"}, {}, torch.float16, "float16"),
    ],
    ids=str,
)
def test_the_type_is_the_one_that_is_stated_or_stored(
    outer: dict[str, Any],
    text: dict[str, Any],
    stored: torch.dtype,
    wanted: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def state(config: dict[str, Any]) -> None:
        for place, given in ((config, outer), (config["text_config"], text), (config["vision_config"], {})):
            for key in ("dtype", "torch_dtype"):
                place.pop(key, None)
            place.update(given)

    edit(folder, state)
    tensors = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["language_model.model.norm.weight"] = tensors["language_model.model.norm.weight"].float()  # one of another type
    store(folder, tensors)
    checkpoint = read_checkpoint(folder)
    config = EngineConfig(model=str(folder))
    model = load_model(checkpoint, config, Split(), torch.device("cpu"), lambda name, done, total: None)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, wanted)}
    assert main(["plan", str(folder), "--tp", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dtype"] == wanted
    rank = document["ranks"][0]
    in_plan = rank["vision_bytes"] + rank["decoder_bytes"] + rank["embedding_bytes"]
    assert in_plan == sum(parameter.nbytes for parameter in model.parameters())


def test_a_plan_from_config_json_alone_says_that_the_type_is_not_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, lambda config: config.pop("dtype"))
    (folder / "model.safetensors").unlink()
    assert main(["plan", str(folder / "config.json")]) == 0
    assert "config.json states no dtype, and no weights are beside it: counted in float32; --dtype" in capsys.readouterr().out


@pytest.mark.parametrize("change", [lambda text: text.pop("model_type"), lambda text: text.update(model_type=None)], ids="rn")
def test_a_text_without_model_type_is_the_familys(change: Change, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoConfig

    edit(folder, lambda config: change(config["text_config"]))
    if "model_type" not in json.loads((folder / "config.json").read_text())["text_config"]:
        assert AutoConfig.from_pretrained(folder).text_config.model_type == "qwen2"
    assert load(folder).decoder.config.model_type == "qwen2"
    assert main(["plan", str(folder)]) == 0
    assert "qwen2 decoder" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["as saved", "as in the model", "without a head", "older"])
def test_weights_have_names_in_every_layout(layout: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    wanted = tensors[EMBEDDING] if layout == "without a head" else tensors[HEAD]
    if layout == "as in the model":
        names = {name: "model." + name.replace("language_model.model.", "language_model.") for name in tensors}
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
        tensors["lm_head.weight"] = tensors.pop("model.language_model.lm_head.weight")
    if layout == "without a head":
        tensors = {name.replace("language_model.model.", "language_model."): t for name, t in tensors.items() if name != HEAD}
        edit(folder, lambda config: config.update(tie_word_embeddings=True))
    if layout == "older":  # with what earlier editions stored of buffers
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["language_model.model.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["vision_tower.embeddings.position_ids"] = torch.arange(17)[None]
    store(folder, tensors)
    assert torch.equal(head(load(folder)), wanted)
