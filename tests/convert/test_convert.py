"""InternVL from one format to the other and back: the same tensors, the same answers, and what transformers makes of it."""

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

import vlserve.convert.run as run_module
from tests.checkpoints import TILE, edit_json
from tests.engine.ranks import tp_engine
from tests.engine.reference import ask, engine, prompt
from tests.llm.quantised import Recipe, awq, fp8, gptq, rewrite
from tests.models.test_sentencepiece_files import train
from tests.original_format import make_original, rename_weights
from tests.vision.test_preprocess import noise
from vlserve import ConfigError, ModelError
from vlserve.commands.main import main
from vlserve.convert.run import convert
from vlserve.convert.tensors import Piece, to_original
from vlserve.models.checkpoint import read_checkpoint
from vlserve.prompt.build import Prompt
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.vision.image_config import IMAGENET_MEAN, IMAGENET_STD

Make = Callable[..., Path]
OF_LLAMA = ("internlm2", "internlm3")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"vision_qk_norm": True, "norm_type": "rms_norm"}),  # as InternViT-6B
    ("qwen3", {}),
    ("qwen3_moe", {}),
    ("llama", {"attention_bias": True}),
    ("phi3", {}),
    ("internlm2", {}),
    ("internlm3", {}),
]

KEPT = (
    *("force_image_size", "ps_version", "select_layer", "min_dynamic_patch", "max_dynamic_patch", "use_thumbnail"),
    *("downsample_ratio", "torch_dtype", "hidden_size", "tie_word_embeddings"),
)


def original_of(decoder: str, checkpoint: Make, folder: Path, outer: dict[str, Any] | None = None, **settings: Any) -> Path:
    is_llama = decoder in OF_LLAMA
    source = checkpoint("llama" if is_llama else decoder, **settings)
    outer = (outer or {}) | {"tie_word_embeddings": settings.get("tie_word_embeddings", False)}
    made = make_original(source, folder, decoder=decoder if is_llama else None, **outer)
    if decoder == "phi3":  # which is scaled by longrope or not at all
        llm = json.loads((made / "config.json").read_text())["llm_config"]
        edit_json(made / "config.json", llm_config=llm | {"rope_scaling": None})
    return made


def with_mean(source: Path, folder: Path, mean: tuple[float, ...] = IMAGENET_MEAN) -> Path:
    """A copy whose pixels are normalised so."""
    shutil.copytree(source, folder)
    for path in folder.glob("*processor_config.json"):
        stored = json.loads(path.read_text())
        stored.get("image_processor", stored).update(image_mean=mean, image_std=IMAGENET_STD)
        path.write_text(json.dumps(stored))
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def prompts(folder: Path) -> list[Prompt]:
    """Pictures of a tile's size, which neither format resizes."""
    pictures = [Image.fromarray(noise(TILE, TILE, seed=seed)) for seed in range(2)]
    return [prompt(folder, "What shape is it?", pictures[:number]) for number in (0, 1, 2)]


@pytest.mark.parametrize("decoder,settings", CASES, ids=str)
def test_there_and_back(decoder: str, settings: dict[str, Any], checkpoint: Make, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    original = original_of(decoder, checkpoint, tmp_path / "original", **settings)
    hf, again = tmp_path / "hf", tmp_path / "again"
    convert(str(original), hf, "hf")
    convert(str(hf), again, "original")
    source = checkpoint("llama" if decoder in OF_LLAMA else decoder, **settings)
    assert are_equal(tensors(hf), tensors(source)), "the names that transformers saves"
    assert are_equal(tensors(again), tensors(original) if decoder != "internlm2" else rename_weights(tensors(source)))
    config = json.loads((again / "config.json").read_text())
    before = json.loads((original / "config.json").read_text())
    assert "auto_map" not in config and not list(again.glob("*.py")) and not list(hf.glob("*.py"))
    same = {
        "force_image_size",
        "ps_version",
        "select_layer",
        "max_dynamic_patch",
        "use_thumbnail",
        "downsample_ratio",
        "torch_dtype",
    }
    assert {key: config[key] for key in same} == {key: before[key] for key in same}
    assert config["llm_config"]["rope_theta"] == before["llm_config"]["rope_theta"]
    asked = prompts(original)
    assert [p.token_ids for p in prompts(hf)] == [p.token_ids for p in prompts(again)] == [p.token_ids for p in asked]
    wanted = ask(engine(original), asked, 8)
    assert ask(engine(hf), prompts(hf), 8) == wanted
    if decoder == "internlm2":  # all others have the same bits again
        assert ask(engine(again), prompts(again), 8) == wanted
    stops = json.loads((hf / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == read_checkpoint(original).end_token_ids == read_checkpoint(again).end_token_ids
    processor = AutoProcessor.from_pretrained(hf)
    theirs, meant = (AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32) for folder in (hf, source))
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What shape is it?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=[rendered], images=[Image.fromarray(noise(TILE, TILE, seed=0))], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == asked[1].token_ids
    with torch.inference_mode():
        assert torch.equal(theirs(**inputs).logits, meant(**inputs).logits)
        answer = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(asked[1].token_ids) :].tolist()
    assert answer == wanted[1]


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
FORMATS: dict[str, tuple[str, Recipe, str | None]] = {
    "awq": ("internlm2", awq(16), "llm_config"),
    "gptq": ("internlm2", gptq(16), None),
    "fp8": ("phi3", fp8("channel", is_compressed=True), None),
    "fp8 in blocks": ("qwen3", fp8("block", (16, 32)), None),
}


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights_answer_alike_in_both_formats(name: str, checkpoint: Make, tmp_path: Path) -> None:
    decoder, recipe, section = FORMATS[name]
    dense = original_of(decoder, checkpoint, tmp_path / "model", **SMALL)
    folder, _ = rewrite(dense, tmp_path / "weights", recipe, section=section)
    hf, again = tmp_path / "hf", tmp_path / "again"
    convert(str(folder), hf, "hf")
    convert(str(hf), again, "original")
    wanted = ask(engine(folder), prompts(folder), 6)
    with tp_engine(hf, 2) as (ours, _):
        assert ask(ours, prompts(hf), 6) == wanted
    if decoder == "internlm2":
        assert ask(engine(again), prompts(again), 6) == wanted
    else:
        assert are_equal(tensors(again), tensors(folder))
    for made, outside in ((hf, ("vision_tower", "multi_modal_projector")), (again, ("vision_model", "mlp1"))):
        described = json.loads((made / "config.json").read_text())["quantization_config"]
        assert described["quant_method"] == recipe.config["quant_method"]
        if name in ("awq", "fp8"):
            assert all(
                any(module in entry for entry in described[key]) for key in described for module in outside if key in LISTS
            )


LISTS = ("modules_to_not_convert", "ignore")


def test_layers_above_the_selected_one_and_one_tile(checkpoint: Make, tmp_path: Path) -> None:
    """What transformers says with other keys: an encoder without these layers, and a grid of one tile."""
    outer = {"select_layer": -2, "dynamic_image_size": False}
    original = original_of("qwen2", checkpoint, tmp_path / "original", outer)
    convert(str(original), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 1 and config["vision_feature_layer"] == -1
    assert not any("encoder.layer.1." in name for name in tensors(tmp_path / "hf"))
    wide = Image.fromarray(noise(90, 30))
    assert len(read_checkpoint(tmp_path / "hf").preprocessor.prepare(wide, "auto").units) == 1
    assert ask(engine(tmp_path / "hf"), prompts(tmp_path / "hf"), 6) == ask(engine(original), prompts(original), 6)


def test_several_files(checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_FILE", 60_000)
    source = with_mean(checkpoint("qwen2", max_shard="70KB"), tmp_path / "source")
    convert(str(source), tmp_path / "out", "original")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    stored = tensors(tmp_path / "out")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert are_equal(stored, rename_weights(tensors(source)))


def test_the_conversation_is_told_by_the_chat_template(
    checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly, then but for the system message, then by what ends a turn, which is said."""
    source = with_mean(checkpoint("qwen2"), tmp_path / "source")

    def told(template: str, name: str) -> str:
        if (source / "processor_config.json").exists():
            edit_json(source / "processor_config.json", chat_template=None)
        (source / "chat_template.jinja").write_text(template)
        assert main(["convert", str(source), str(tmp_path / name), "--to", "original"]) == 0
        assert (tmp_path / name / "chat_template.jinja").read_text() == template
        return str(json.loads((tmp_path / name / "config.json").read_text())["template"])

    as_saved = (checkpoint("qwen2") / "chat_template.jinja").read_text()
    assert told(as_saved, "one") == "internvl3_5"
    assert "nearest" not in capsys.readouterr().out
    start = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    assert told(start + as_saved, "two") == "internvl2_5"
    assert "template is 'internvl2_5', the nearest to the chat template" in capsys.readouterr().out
    assert told("{% for m in messages %}{{ m.content }}{% endfor %}", "three") == "internvl3_5"
    out = capsys.readouterr().out
    assert "the nearest" in out and "config.json has no auto_map" in out and f"vlserve serve {tmp_path / 'three'}" in out


@pytest.mark.parametrize(
    "to,changes,message",
    [
        ("hf", {"ps_version": "v1"}, "ps_version v1 has no counterpart in transformers"),
        ("hf", {"use_thumbnail": False}, "use_thumbnail false has no counterpart"),
        ("hf", {"dynamic_image_size": False, "pad2square": True}, "pad2square true has no counterpart"),
        ("original", {}, "is the format original already"),
    ],
    ids=str,
)
def test_what_transformers_cannot_say_is_refused(
    to: str, changes: dict[str, Any], message: str, checkpoint: Make, tmp_path: Path
) -> None:
    original = original_of("qwen2", checkpoint, tmp_path / "original", changes)
    with pytest.raises(ConfigError, match=message):
        convert(str(original), tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_what_opengvlabs_format_cannot_say_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="text_config.model_type 'mistral' has no counterpart in OpenGVLab's format"):
        convert(str(with_mean(checkpoint("mistral"), tmp_path / "mistral")), out, "original")
    with pytest.raises(ConfigError, match=r"the image processor's mean is .*it is always \(0.485, 0.456, 0.406\)"):
        convert(str(with_mean(checkpoint("qwen2"), tmp_path / "source", (0.5, 0.5, 0.5))), out, "original")
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no model_type"):
        convert(str(text), out, "hf")
    with pytest.raises(ConfigError, match="is not empty; give a new or an empty folder"):
        convert("demo", tmp_path / "source", "original")
    assert not out.exists()


def test_a_break_and_a_damaged_checkpoint_leave_nothing(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = original_of("qwen2", checkpoint, tmp_path / "original")

    def stop(*_: Any) -> None:
        assert any(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_write_file", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(str(original), tmp_path / "out", "hf")
    stored = load_file(original / "model.safetensors")
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    del stored[name]
    save_file(stored, original / "model.safetensors")
    with pytest.raises(ModelError, match=f"weights missing from original: {name}"):
        convert(str(original), tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_a_tokenizer_of_pieces_becomes_one_that_transformers_reads(checkpoint: Make, tmp_path: Path) -> None:
    """InternLM2's: tokenizer.model, whose class is the checkpoint's own code, and tokens that are added behind its pieces."""
    from transformers import AutoProcessor

    original = original_of("internlm2", checkpoint, tmp_path / "original")
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (original / name).unlink()
    (original / "tokenizer.model").write_bytes(train())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>"]
    ids = [1, 2, 0, *range(420, 426)]
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(id): {"content": name, **flags} for id, name in zip(ids, added, strict=True)},
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "additional_special_tokens": added[3:],
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    (original / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_json(original / "config.json", template="internlm2-chat")
    convert(str(original), tmp_path / "hf", "hf")
    processor, ours = AutoProcessor.from_pretrained(tmp_path / "hf"), Tokenizer(original)
    assert processor.tokenizer.convert_tokens_to_ids("<video>") == 426
    for text in ("What shape is it?", " a  b\n", "é 漢字 🙂", "it's 12 o'clock, <b>"):
        theirs = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert theirs == ours.encode_plain(text, at_beginning=True), text
    for number, asked in enumerate(prompts(original)):
        content = [*[{"type": "image"}] * number, {"type": "text", "text": "What shape is it?"}]
        rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        pictures = [Image.fromarray(noise(TILE, TILE, seed=seed)) for seed in range(number)]
        inputs = processor(text=[rendered], images=pictures or None, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == asked.token_ids
        assert prompts(tmp_path / "hf")[number].token_ids == asked.token_ids


def test_names_as_transformers_has_them_inside() -> None:
    """Editions that were not saved by transformers' own writer."""
    for name, wanted in {
        "model.vision_tower.encoder.layer.3.attention.k_proj.bias": Piece("vision_model.encoder.layers.3.attn.qkv.bias", 1, 3),
        "model.vision_tower.encoder.layer.0.lambda_2": Piece("vision_model.encoder.layers.0.ls2"),
        "model.multi_modal_projector.linear_2.weight": Piece("mlp1.3.weight"),
        "model.language_model.layers.0.mlp.up_proj.qweight": Piece("language_model.model.layers.0.mlp.up_proj.qweight"),
        "model.language_model.norm.weight": Piece("language_model.model.norm.weight"),
        "lm_head.weight": Piece("language_model.lm_head.weight"),
    }.items():
        assert to_original(name) == wanted
    assert to_original("value_head.weight") is None
