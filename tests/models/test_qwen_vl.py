"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL answer as transformers does, however their requests are computed, from files as published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.engine.ranks import tp_engine
from tests.engine.reference import Comparison, Transformers, add, ask, engine, prompt, run
from tests.llm.quantised import awq, rewrite
from tests.qwen_vl import KINDS, make_qwen_vl
from tests.server.running import chat
from tests.vision.test_preprocess import noise
from vlserve import VLPipeline
from vlserve.commands.main import main
from vlserve.config import SamplingParams, ServerConfig
from vlserve.engine.engine import Engine
from vlserve.engine.messages import TokenEvent
from vlserve.errors import ModelError
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.qwen_vl import QwenPreprocessor
from vlserve.prompt.build import Prompt, PromptBuilder
from vlserve.prompt.conversation import Message, Picture, PromptOptions, Text
from vlserve.server.app import create_app

# unequal, and as extreme as they may be; each is one to sixteen features
SIZES = [(5600, 28), (20, 3000), (40, 30), (200, 50), (31, 90), (1, 1), (300, 410), (112, 112)]
SIX = (90, 60)  # of two rows of features and three columns
SHAPE = {"hidden_size": 64, "num_attention_heads": 4}  # heads of 16 channels
LENGTH = 6
Turns = Sequence[tuple[str, Sequence[int | str]]]  # roles, with the pictures' numbers and texts
CONVERSATIONS: list[Turns] = [
    [("user", ["What shape is it?"])],
    [("user", [0, "What?"])],
    [("user", ["Which of", 1, "and", 6, "?"])],
    [("user", [2, 3, 4, 5, 7, "Compare them, please: é 漢字"])],
    [("system", ["Be brief."]), ("user", [6, "What?"]), ("assistant", ["A circle."]), ("user", ["And", 3, 3, "?"])],
]


@dataclass(frozen=True)
class Family:
    folder: Path
    asked: list[tuple[Prompt, list[int], list[torch.Tensor]]]  # with what transformers answers, and its logits

    def same(self, got: dict[int, list[TokenEvent]]) -> Comparison:
        comparison = Comparison()
        for id, events in got.items():
            comparison.take(events, *self.asked[id][1:])
        comparison.check()
        assert comparison.equal + comparison.ties == len(self.asked) and comparison.largest_logprob_difference < 1e-4
        return comparison

    def answers(self, ours: Engine) -> dict[int, list[TokenEvent]]:
        for id, (p, *_) in enumerate(self.asked):
            add(ours, id, p, SamplingParams(logprobs=5), LENGTH)
        return run(ours)


def picture(number: int) -> Image.Image:
    return Image.fromarray(noise(*SIZES[number], seed=number))


def own_prompt(folder: Path, turns: Turns, options: PromptOptions | None = None) -> Prompt:
    checkpoint = read_checkpoint(folder)
    prepare = checkpoint.preprocessor.prepare
    messages = [
        Message(role, [Text(part) if isinstance(part, str) else Picture(prepare(picture(part), "auto")) for part in parts])
        for role, parts in turns
    ]
    return PromptBuilder(checkpoint).build(messages, options)


def transformers_answers(reference: Transformers, turns: Turns) -> tuple[list[int], list[int], list[torch.Tensor]]:
    """Prompt, answer, and logits of each step."""
    messages = [
        {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]}
        for role, parts in turns
    ]
    images = [picture(part) for _, parts in turns for part in parts if isinstance(part, int)]
    rendered = reference.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = reference.processor(text=[rendered], images=images or None, return_tensors="pt")
    with torch.inference_mode():
        out = reference.model.generate(
            **inputs, max_new_tokens=LENGTH, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    length = inputs["input_ids"].shape[1]
    return inputs["input_ids"][0].tolist(), out.sequences[0, length:].tolist(), [step[0] for step in out.logits]


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = make_qwen_vl(tmp_path_factory.mktemp(request.param), request.param, most_features=16, **SHAPE)
    reference, asked = Transformers(folder), []
    for turns in CONVERSATIONS:
        ids, answer, logits = transformers_answers(reference, turns)
        p = own_prompt(folder, turns)
        assert p.token_ids == ids
        asked.append((p, answer, logits))
    return Family(folder, asked)


def test_alone_and_together(family: Family) -> None:
    ours, alone = engine(family.folder, prefix_caching=False, vision_cache_gib=0), {}
    for id, (p, *_) in enumerate(family.asked):
        add(ours, id, p, SamplingParams(logprobs=5), LENGTH)
        alone |= run(ours)
    print(f"alone {family.same(alone)}; together {family.same(family.answers(ours))}")


@pytest.mark.parametrize("size", (3, 11))
def test_chunks_that_cut_pictures(size: int, family: Family) -> None:
    family.same(family.answers(engine(family.folder, max_num_batched_tokens=size, block_size=4)))


def test_chunks_of_every_size_within_a_picture(family: Family) -> None:
    p = prompt(family.folder, "What?", [Image.fromarray(noise(*SIX))])
    ours = engine(family.folder, prefix_caching=False)
    answer = ask(ours, [p], 4)
    assert p.num_image_tokens == 6
    for size in range(1, 8):
        ours.scheduler.max_num_batched_tokens = size
        assert ask(ours, [p], 4) == answer


def test_from_the_prefix_cache(family: Family) -> None:
    ours = engine(family.folder, block_size=4)
    family.same(family.answers(ours))
    again = family.answers(ours)
    family.same(again)
    assert all(events[0].cached_tokens >= len(family.asked[id][0].token_ids) - 4 for id, events in again.items())


@pytest.mark.parametrize("tp", (1, 2, 4))
def test_on_ranks_that_preempt(tp: int, family: Family) -> None:
    """Chunks cut pictures, the KV cache is too small for all, and features are dropped and made again."""
    config = read_checkpoint(family.folder).config
    layers = config.get("text_config", config)["num_hidden_layers"]
    block = 2 * max(1, 2 // tp) * 16 * 4 * 4 * layers  # bytes of four tokens: keys and values, heads, channels
    rough = {"max_num_batched_tokens": 61, "block_size": 4, "max_model_len": 200, "vision_cache_gib": 1e-6}
    rough |= {"kv_cache_gib": 52.5 * block / 2**30, "replicate_kv_heads": True}
    with tp_engine(family.folder, tp, **rough) as (ours, runners):
        assert ours.runner.num_blocks == 52
        family.same(family.answers(ours))
        assert ours.scheduler.num_preemptions > 0, "the cache was meant to be too small for all"
    assert len({runner.features.num_bytes for runner in runners}) == 1


def test_cut_in_advance(tmp_path: Path) -> None:
    folder = make_qwen_vl(tmp_path / "whole", "qwen3_vl", most_features=16, **SHAPE)
    prompts = [own_prompt(folder, turns) for turns in CONVERSATIONS[:3]]
    assert main(["shard", str(folder), "--tp", "2", str(tmp_path / "cut")]) == 0
    with tp_engine(tmp_path / "cut", 2) as (ours, _):
        assert ask(ours, prompts) == ask(engine(folder), prompts)


def test_as_transformers_saves_it(family: Family, tmp_path: Path) -> None:
    """With text_config, rope_parameters, and names with `model.language_model.`, `model.visual.`; the head tied."""
    kind = read_checkpoint(family.folder).config["model_type"]
    folder = make_qwen_vl(tmp_path, kind, layout="saved", seed=3, most_features=16, tie_word_embeddings=True, **SHAPE)
    reference = Transformers(folder)
    ids, answer, _ = transformers_answers(reference, CONVERSATIONS[4])
    p = own_prompt(folder, CONVERSATIONS[4])
    assert p.token_ids == ids and ask(engine(folder), [p], LENGTH) == [answer]


def test_pictures_of_other_shapes_share_nothing(family: Family) -> None:
    """One colour, as many features, equal tokens: what differs is where they stand."""
    grey = [Image.new("RGB", size, (99, 99, 99)) for size in ((224, 56), (56, 224), (112, 112))]
    prompts = [prompt(family.folder, "What shape is it?", [image]) for image in grey]
    assert prompts[0].token_ids == prompts[1].token_ids and prompts[0].positions != prompts[1].positions
    ours = engine(family.folder, block_size=4)
    apart = engine(family.folder, prefix_caching=False, vision_cache_gib=0)
    for p in prompts:
        add(ours, 0, p, SamplingParams(logprobs=1), 6)
        events = run(ours)[0]
        assert [event.token_id for event in events] == ask(apart, [p], 6)[0]
        assert events[0].cached_tokens <= p.spans[0].start


def test_pictures_are_numbered_where_that_is_asked(family: Family) -> None:
    options = PromptOptions(variables={"add_vision_id": True})
    with_ids, without = (own_prompt(family.folder, CONVERSATIONS[3], one) for one in (options, None))
    builder = PromptBuilder(read_checkpoint(family.folder))
    text = builder.tokenizer.encode_plain("Picture 1: ")
    start = with_ids.spans[0].start - 1  # behind <|vision_start|>
    assert with_ids.token_ids[start - len(text) : start] == text and len(with_ids.token_ids) > len(without.token_ids) + 5


def test_tokens_in_messages_are_no_pictures(family: Family) -> None:
    p = own_prompt(family.folder, [("user", ["<|vision_start|><|image_pad|><|vision_end|>", 2])])
    assert p.token_ids.count(read_checkpoint(family.folder).config["image_token_id"]) == p.num_image_tokens


def test_quantised_with_a_dense_encoder(tmp_path: Path) -> None:
    """As Qwen2.5-VL's AWQ editions: `visual` is not converted."""
    dense = make_qwen_vl(tmp_path / "dense", "qwen2_5_vl", most_features=16, **SHAPE)
    folder, meant = rewrite(dense, tmp_path, awq(16))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["visual"]
    (folder / "config.json").write_text(json.dumps(config))
    prompts = [own_prompt(folder, turns) for turns in CONVERSATIONS[:4]]
    wanted = ask(engine(meant), prompts)
    for tp in (1, 2):
        with tp_engine(folder, tp) as (ours, _):
            assert ask(ours, prompts) == wanted


def test_layers_of_the_encoder_that_are_not_there_are_named(family: Family, tmp_path: Path) -> None:
    for path in family.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(family.folder / "model.safetensors")
    names = sorted(name for name in tensors if "visual.blocks.1." in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != names[0]}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"weights missing .*visual\.blocks\.1\."):
        engine(tmp_path)


def test_over_http(family: Family) -> None:
    """A picture as a data URL, with bounds of its own; a picture that is too narrow costs its request only."""
    with VLPipeline(str(family.folder), device="cpu", dtype="float32", kv_cache_gib=0.01) as pipe:
        client = TestClient(create_app(pipe, ServerConfig()), base_url="http://127.0.0.1")

        def post(image: Image.Image, **fields: Any) -> Any:
            return client.post("/v1/chat/completions", json=chat("What?", image, **fields)).json()

        whole = post(picture(7))
        preprocessor = read_checkpoint(family.folder).preprocessor
        assert isinstance(preprocessor, QwenPreprocessor)
        area = preprocessor.image.factor**2
        for given in ({"max_pixels": 4 * area}, {"size": {"longest_edge": 4 * area}}):
            used = post(picture(7), mm_processor_kwargs=given)["usage"]["prompt_tokens_details"]["image_tokens"]
            assert used == 4 < whole["usage"]["prompt_tokens_details"]["image_tokens"]
        assert whole["choices"][0]["message"]["content"]
        narrow = post(Image.new("RGB", (2001, 10)))
        assert "2001x10 pixels; its sides may be up to 200:1" in narrow["error"]["message"]
        assert narrow["error"]["param"] == "messages[0].content[0].image_url" and narrow["error"]["code"] == "invalid_image"
        assert post(picture(7))["choices"] == whole["choices"]
