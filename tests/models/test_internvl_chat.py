"""OpenGVLab's own format: the weights of a checkpoint in transformers' format, its pixels, prompts, tokenizer and settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import TILE, edit_json
from tests.engine.ranks import tp_engine
from tests.engine.reference import ask, engine, prompt
from tests.llm.quantised import awq, rewrite
from tests.original_format import make_original
from tests.prompt.test_build import copy_of
from tests.vision.test_preprocess import noise
from vlserve.commands.shard import shard
from vlserve.config import EngineConfig
from vlserve.errors import ModelError
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.internvl_chat import CONVERSATIONS
from vlserve.models.tiles import TilePreprocessor
from vlserve.plan.model_shape import read_model_shape
from vlserve.prompt.build import Prompt, PromptBuilder
from vlserve.prompt.conversation import Message, Picture, PromptOptions, Text
from vlserve.prompt.tokenizer import Tokenizer
from vlserve.vision.image_config import IMAGENET_MEAN, IMAGENET_STD, ImageConfig
from vlserve.vision.preprocess import make_tiles
from vlserve.vision.projector import pixel_shuffle

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def original(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(decoder, settings of the source) -> its twin; `outer` and `vision` as `make_original`."""
    made: dict[str, Path] = {}

    def get(decoder: str = "qwen2", *, outer: dict[str, Any] | None = None, vision: Any = None, **settings: Any) -> Path:
        key = repr((decoder, outer, vision, sorted(settings.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("original") / "model"
            made[key] = make_original(checkpoint(decoder, **settings), folder, vision=vision, **outer or {})
        return made[key]

    return get


def with_template_of(source: Path, folder: Path) -> Path:
    """So that prompts are equal too."""
    template = json.loads((source / "processor_config.json").read_text()).get("chat_template")
    (folder / "chat_template.jinja").write_text(template or (source / "chat_template.jinja").read_text())
    return folder


@pytest.mark.parametrize(
    "decoder,settings",
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("qwen3_moe", {}),
        ("llama", {}),
        ("phi3", {"sliding_window": 7}),
        ("internlm2", {}),
        ("internlm3", {}),
        ("qwen2", {"vision_qk_norm": True, "norm_type": "rms_norm"}),  # as InternViT-6B
    ],
    ids=str,
)
def test_one_set_of_weights_answers_alike_in_both_formats(
    decoder: str, settings: dict[str, Any], checkpoint: Callable[..., Path], original: Made, tmp_path: Path
) -> None:
    """Pictures are of a tile's size: nothing is resized, and pixels are equal."""
    is_llama = decoder.startswith("internlm")  # transformers has none of them; their arithmetic is a Llama's
    theirs = copy_of(checkpoint("llama" if is_llama else decoder, **settings), tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (theirs / name).exists():
            stored = json.loads((theirs / name).read_text())
            stored.get("image_processor", stored).update(image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
            (theirs / name).write_text(json.dumps(stored))
    ours = with_template_of(theirs, make_original(theirs, tmp_path / "model", decoder=decoder if is_llama else None))
    pictures = [Image.fromarray(noise(TILE, TILE, seed=seed)) for seed in range(5)]

    def prompts(folder: Path) -> list[Prompt]:
        return [prompt(folder, "What shape is it?", pictures[:number]) for number in (0, 1, 2, 5)]

    assert [p.token_ids for p in prompts(theirs)] == [p.token_ids for p in prompts(ours)]
    assert ask(engine(theirs), prompts(theirs)) == ask(engine(ours), prompts(ours))


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize("decoder,form", [("internlm2", "dense"), ("internlm2", "awq"), ("qwen2", "awq"), ("qwen3_moe", "awq")])
def test_pictures_of_unequal_shapes_at_every_degree(
    decoder: str, form: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Degree 4 has copies of the two key-value heads; a dense checkpoint also answers from the shards that are cut of it."""
    is_llama = decoder == "internlm2"
    source = checkpoint("llama" if is_llama else decoder, **SMALL)
    folder = make_original(source, tmp_path / "model", decoder=decoder if is_llama else None)
    meant = folder
    if form == "awq":
        folder, meant = rewrite(folder, tmp_path / "weights", awq(16))
    pictures = [Image.fromarray(noise(*size)) for size in [(40, 30), (200, 50), (31, 90), (64, 64), (28, 28)]]
    prompts = [prompt(folder, "What shapes are there?", pictures[:number]) for number in range(1, 6)]
    wanted = ask(engine(meant), prompts, 6)
    for tp in (1, 2, 4):
        with tp_engine(folder, tp, replicate_kv_heads=True) as (ours, _):
            assert ask(ours, prompts, 6) == wanted, tp
    if form == "dense":
        shard(EngineConfig(model=str(folder), tp=2), tmp_path / "shards")
        with tp_engine(tmp_path / "shards", 2) as (ours, _):
            assert ask(ours, prompts, 6) == wanted


def published_tiles(image: Image.Image, config: ImageConfig) -> list[Image.Image]:
    """By the description of the published preprocessing: grid, Pillow's bicubic, crop, thumbnail last."""
    size, (width, height) = config.tile_size, image.size
    if not config.dynamic:
        if config.pad_to_square:
            side = max(width, height)
            square = Image.new("RGB", (side, side), tuple(int(part * 255) for part in config.mean))
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        return [image.resize((size, size), Image.Resampling.BICUBIC)]
    most = config.max_patches
    ratios = {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if config.min_patches <= i * j <= most}
    best, best_ratio = float("inf"), (1, 1)
    for ratio in sorted(ratios, key=lambda one: one[0] * one[1]):
        off = abs(width / height - ratio[0] / ratio[1])
        if off < best or (off == best and width * height > 0.5 * size * size * ratio[0] * ratio[1]):
            best, best_ratio = off, ratio
    columns, rows = best_ratio
    whole = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    boxes = [(c * size, r * size, (c + 1) * size, (r + 1) * size) for r in range(rows) for c in range(columns)]
    tiles = [whole.crop(box) for box in boxes]
    return [*tiles, image.resize((size, size), Image.Resampling.BICUBIC)] if config.thumbnail and len(tiles) > 1 else tiles


SIZES = [(28, 28), (90, 30), (31, 90), (200, 50), (1, 1), (64, 64), (57, 41), (300, 17), (640, 480), (5, 200)]


@pytest.mark.parametrize(
    "outer",
    [
        {},
        {"use_thumbnail": False},
        {"dynamic_image_size": False},
        {"dynamic_image_size": False, "pad2square": True},
        {"min_dynamic_patch": 2, "max_dynamic_patch": 12},
    ],
    ids=str,
)
def test_pixels_are_those_of_the_published_preprocessing(outer: dict[str, Any], original: Made) -> None:
    preprocessor = read_checkpoint(original(outer=outer or None)).preprocessor
    assert isinstance(preprocessor, TilePreprocessor)
    for width, height in SIZES:
        image = Image.fromarray(noise(width, height))
        tiles = published_tiles(image, preprocessor.image)
        got = preprocessor.prepare(image, "auto")
        wanted = np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])
        assert np.array_equal(got.data.reshape(wanted.shape), wanted), (width, height)
        assert preprocessor.count_features(width, height, "auto") == got.num_features <= preprocessor.most_features()


def test_pixels_of_the_two_formats_are_told_apart(checkpoint: Callable[..., Path], original: Made) -> None:
    image = Image.fromarray(noise(90, 30))
    digests = {read_checkpoint(folder).preprocessor.prepare(image, "auto").digest for folder in (checkpoint(), original())}
    assert len(digests) == 2


def published_shuffle(x: torch.Tensor, *, scale: float, version: str) -> torch.Tensor:
    """As the published code has it, [N, P, C] -> [N, K, C / scale^2]."""
    number, patches, width = x.shape
    side = int(patches**0.5)
    short, wide = int(side * scale), int(width / scale)
    x = x.reshape(number, side, side, width).reshape(number, side, short, wide).transpose(1, 2)
    x = x.reshape(number, short, short, int(wide / scale))
    x = x if version == "v1" else x.transpose(1, 2)
    return x.reshape(number, short * short, -1)


@pytest.mark.parametrize("version", ("v1", "v2"))
@pytest.mark.parametrize("ratio", (2, 4))
def test_both_pixel_shuffles(version: str, ratio: int) -> None:
    x = torch.rand(3, 64, 5, dtype=torch.float64)
    wanted = published_shuffle(x, scale=1 / ratio, version=version)
    assert torch.equal(pixel_shuffle(x, ratio, transposed=version == "v1"), wanted)


@pytest.mark.parametrize("select_layer", (-1, -2, 1, 2))
@pytest.mark.parametrize("version", ("v1", "v2"))
def test_features_of_the_layer_that_is_selected(
    select_layer: int, version: str, original: Made, checkpoint: Callable[..., Path]
) -> None:
    from transformers import InternVLForConditionalGeneration

    theirs = InternVLForConditionalGeneration.from_pretrained(checkpoint(), dtype=torch.float64)
    x = torch.rand(2, 3, TILE, TILE)
    with torch.no_grad():
        states = theirs.model.vision_tower(x.double(), output_hidden_states=True).hidden_states
        projector = theirs.model.multi_modal_projector
        shuffled = published_shuffle(states[select_layer][:, 1:], scale=0.5, version=version)
        wanted = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(projector.layer_norm(shuffled))))
    ours = engine(original(outer={"select_layer": select_layer, "ps_version": version})).runner.model.tower
    assert ours is not None
    with torch.inference_mode():
        assert torch.allclose(ours.features(x).double(), wanted, atol=1e-4)  # type: ignore[operator]


TEXTS = [
    *("", " ", "\n", "  two  blanks ", "tab\tand\r\nlines\n\n", "it's we'll I'D", "1234567 3.14", "a_b-c/d", "<img> <b>"),
    *("<|im_start|>user\n", "x<|im_end|>y", "<IMG_CONTEXT>" * 3, "e\u0301", "\u200b", "\ufb01", "A" * 50, "é 漢字 🙂"),
    *("¿Qué?", "नमस्ते", "مرحبا"),
]


def test_the_tokenizer_without_its_file_equals_transformers(original: Made) -> None:
    from transformers import Qwen2Tokenizer

    folder = original()
    assert not (folder / "tokenizer.json").exists()
    theirs, ours = Qwen2Tokenizer.from_pretrained(folder), Tokenizer(folder)
    words = ["What", "shape", "is", "it?", "A", "red", "circle", "and", "two", "blue", "squares,", "it's", "12", "o'clock"]
    texts = TEXTS + [" ".join(words[i : i + n]) + end for i in range(6) for n in range(1, 8) for end in ("", "\n", "!!")]
    assert len(texts) > 100
    for text in texts:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours._encode_whole([Text(text)]) in (ids, None) and ours.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True
        )
        if not any(token in text for token in ours.added):
            assert ours.encode_plain(text, at_beginning=True) == ids, text


ROLES = {"user": "<|im_start|>user\n", "assistant": "<|im_start|>assistant\n"}
PHI_ROLES = {"user": "<|user|>\n", "assistant": "<|assistant|>\n"}
TURNS = [("user", "<image>\n<image>\nWhat is it?"), ("assistant", "A circle."), ("user", "Which color?")]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("system", ("", "Be brief."))
def test_prompts_of_the_published_conversations(name: str, system: str, original: Made) -> None:
    """System, turns and separators by the published description of `get_prompt`; pictures where users write <image>."""
    checkpoint = read_checkpoint(original(outer={"template": name}))
    roles, end = (PHI_ROLES, "<|end|>") if name == "phi3-chat" else (ROLES, "<|im_end|>" + "\n" * name.startswith("internvl"))
    opening = "<|system|>\n" if name == "phi3-chat" else "<|im_start|>system\n"
    system_message = system or CONVERSATIONS[name].message
    wanted = opening + system_message + end if system_message else ""
    for role, text in TURNS:
        wanted += roles[role] + text + end
    wanted += roles["assistant"]
    picture = Image.fromarray(noise(TILE, TILE))
    parts: dict[int, list[Any]] = {0: [Picture(checkpoint.preprocessor.prepare(picture, "auto"))] * 2 + [Text("What is it?")]}
    messages = [Message("system", [Text(system)])] if system else []
    messages += [Message(role, parts.get(i, [Text(text)])) for i, (role, text) in enumerate(TURNS)]
    builder = PromptBuilder(checkpoint)
    got = builder.build(messages, PromptOptions())
    wanted = wanted.replace("<image>", f"<img>{'<IMG_CONTEXT>' * 4}</img>")
    assert builder.tokenizer.decode(got.token_ids, skip_special_tokens=False) == wanted


def test_turns_end_where_the_conversation_ends_them(original: Made) -> None:
    """config.json has the end of a text only; that of a turn is the tokenizer's and the conversation's."""
    folder = original()
    names = Tokenizer(folder).token_id
    assert read_checkpoint(folder).end_token_ids == {names("<|endoftext|>"), names("<|im_end|>")}


def test_the_placeholder_is_read_from_the_tokenizer(original: Made, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(original())
    assert checkpoint.preprocessor.placeholders()["image"].id == Tokenizer(original()).token_id("<IMG_CONTEXT>")
    assert "image_token_id" not in checkpoint.config


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"template": "internvl_zh"}, "template 'internvl_zh' is not supported; supported: Hermes-2, internlm2-chat"),
        ({"force_image_size": 336}, "force_image_size 336 is not supported beside vision_config.image_size 28"),
        ({"select_layer": -9}, "select_layer is -9; expected 1 to 2, or from the end -1 to -2"),
        ({"ps_version": "v3"}, "ps_version 'v3' is not supported; supported: v1, v2"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch is 0; expected a whole number of 1 to 256"),
        ({"use_thumbnail": "yes"}, "use_thumbnail is 'yes'; expected true or false"),
        ({"llm_config": None}, "llm_config is None; expected an object"),
    ],
    ids=str,
)
def test_what_is_not_served_is_told_by_its_key(changes: dict[str, Any], message: str, original: Made, tmp_path: Path) -> None:
    copy = copy_of(original(), tmp_path)
    edit_json(copy / "config.json", **changes)
    with pytest.raises(ModelError) as error:
        read_checkpoint(copy)
    assert message in str(error.value)


def test_tiles_of_a_request(original: Made) -> None:
    preprocessor = read_checkpoint(original()).preprocessor
    image = Image.fromarray(noise(300, 200))
    one = preprocessor.configured({"max_dynamic_patch": 1}).prepare(image, "auto")
    assert len(one.units) == 1 and len(preprocessor.prepare(image, "auto").units) == 7
    assert len(preprocessor.prepare(image, "low").units) == 1


def test_make_tiles_of_both_kinds_differ_by_little() -> None:
    config = ImageConfig(tile_size=TILE, tokens_per_tile=4)
    image = Image.fromarray(noise(90, 31))
    one, other = (make_tiles(image, replace(config, resize=kind)).data.astype(int) for kind in ("torch", "pillow"))
    assert 0 <= np.abs(one - other).max() <= 1


def test_internvl3_8b_as_published() -> None:
    """Its config.json's sizes, with the keys that mislead."""
    config = {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "hidden_size": 3584,
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "eos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "model_type": "qwen2",
            "moe_config": None,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151674,
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": None,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_thumbnail": True,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "image_size": 448,
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "moe_intermediate_size": 768,
            "norm_type": "layer_norm",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_experts": 8,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "qk_normalization": False,
            "qkv_bias": True,
            "tie_word_embeddings": True,
            "use_moe": False,
        },
    }
    shape = read_model_shape(config)
    assert not shape.reasons and shape.decoder.num_experts == 0 and shape.decoder.section == "llm_config"
    assert shape.image_tokens == 13 * 256 and shape.tokens_per_tile == 256
    assert shape.encoder is not None and shape.encoder.num_hidden_layers == 24
