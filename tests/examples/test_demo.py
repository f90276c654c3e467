"""The model in the box: a real checkpoint that transformers loads, that answers as it says, in every way it is asked."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.engine.reference import Comparison, Transformers, add, engine, prompt, run
from vlserve import SamplingParams, VLPipeline
from vlserve.models.checkpoint import DEMO, read_checkpoint
from vlserve.models.tiles import TilePreprocessor

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples/demo_model"))
from held_out import Item, is_right, make_items  # noqa: E402

NUM_ITEMS = int(os.environ.get("VLSERVE_DEMO_ITEMS", "60"))  # more of them take their time


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return make_items(NUM_ITEMS, seed=7)


@pytest.fixture(scope="module")
def pipe() -> Iterator[VLPipeline]:
    with VLPipeline(kv_cache_gib=0.2) as pipe:
        yield pipe


def test_what_the_box_promises() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 16 * 2**20
    checkpoint = read_checkpoint(DEMO)
    text, vision = checkpoint.config["text_config"], checkpoint.config["vision_config"]
    assert vision["num_attention_heads"] == 5
    assert (text["num_attention_heads"], text["num_key_value_heads"]) == (8, 4)
    assert text["max_position_embeddings"] >= 8192 and text["model_type"] == "qwen2"
    for tp in (1, 2, 4):
        for width in (text["vocab_size"], text["hidden_size"], text["intermediate_size"]):
            assert width % tp == 0
        assert text["intermediate_size"] // tp % 32 == 0 and text["hidden_size"] // tp % 32 == 0
    assert isinstance(checkpoint.preprocessor, TilePreprocessor)
    assert checkpoint.preprocessor.image.dynamic and checkpoint.preprocessor.image.max_patches > 1


def test_answers_equal_transformers(items: list[Item]) -> None:
    reference, ours, comparison = Transformers(DEMO), engine(DEMO, max_num_seqs=16), Comparison()
    wanted = []
    for id, item in enumerate(items):
        images = [Image.open(io.BytesIO(image)).convert("RGB") for image in item.images]
        p = prompt(DEMO, item.turns[0], images)
        wanted.append(reference.generate(item.turns[0], images, 24))
        assert p.token_ids == wanted[-1][0]
        add(ours, id, p, SamplingParams(logprobs=5), 24)
    for id, events in sorted(run(ours).items()):
        comparison.take(events, *wanted[id][1:])
    print(f"demo: {comparison}")
    comparison.check()
    assert comparison.largest_logprob_difference < 1e-3


def test_it_answers_right_far_more_often_than_chance(pipe: VLPipeline) -> None:
    items = [item for item in make_items(120, seed=7, tasks=("shape", "colour")) if item.language == "en"]
    answers = pipe([(item.turns[0], item.images[0]) for item in items], max_tokens=24)
    right = sum(is_right(item, answer.text) for item, answer in zip(items, answers, strict=True))
    assert right >= 0.8 * len(items), f"{right} of {len(items)}; guessing gives about a ninth"


def test_the_readmes_question(pipe: VLPipeline) -> None:
    readme = (ROOT / "README.md").read_text()
    question = json.loads(readme.split('{"type": "text", "text": ')[1].split("}]}]}'")[0])
    answer = readme.split("`content` is `")[1].split("`")[0]
    assert pipe((question, ROOT / "examples/pictures/shapes.png"), max_tokens=16).text == answer


def test_the_answers_that_the_readme_lists(pipe: VLPipeline) -> None:
    rows = re.findall(r"^\| \[\w+\.png\]\((.+)\) \| (.+) \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 3
    for picture, question, answer in rows:
        assert pipe((question, ROOT / picture), max_tokens=24).text == answer


def test_the_conversation_that_is_printed(
    pipe: VLPipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlserve.VLPipeline", lambda: nullcontext(pipe), raising=False)
    runpy.run_path(str(ROOT / "examples/conversation.py"), run_name="__main__")
    _, _, printed = (ROOT / "docs/conversation.md").read_text().split("\n\n", 2)
    assert capsys.readouterr().out.strip() == printed.strip()


def test_the_question_may_come_before_the_picture(pipe: VLPipeline) -> None:
    """As in OpenAI's own examples."""
    picture: Any = {"type": "image", "image": ROOT / "examples/pictures/shapes.png"}
    for question, answer in (
        ("How many shapes are there?", "There are 3 shapes."),
        ("What colour is the star?", "The star is yellow."),
        ("What shape is the red one?", "The red one is a circle."),
    ):
        for parts in ([{"type": "text", "text": question}, picture], [picture, {"type": "text", "text": question}]):
            assert pipe([{"role": "user", "content": parts}], max_tokens=24).text == answer
