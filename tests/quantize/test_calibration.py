"""Calibration conversations from a JSONL file: their pictures, their answers, and lines that are wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.vision.test_preprocess import encoded, noise
from vlserve import ConfigError
from vlserve.models.checkpoint import read_checkpoint
from vlserve.quantize.calibration import read_samples
from vlserve.quantize.settings import Settings


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen2")


def settings(model: Path, out: Path, **changes: Any) -> Settings:
    return Settings(**{"model": str(model), "out": out, "samples": 3, **changes})


def write_lines(path: Path, *documents: Any) -> Path:
    path.write_text("\n".join(text if isinstance(text, str) else json.dumps(text) for text in documents) + "\n")
    return path


def test_a_jsonl_file_gives_the_samples(model: Path, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(noise(60, 30)), "PNG")
    (tmp_path / "picture.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    answer = {"role": "assistant", "content": "A red circle."}
    parts = [
        {"type": "image_url", "image_url": {"url": "picture.png"}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": str(tmp_path / "picture.png")},
    ]
    lines = [{"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}, answer]} for part in parts]
    path = write_lines(tmp_path / "chats.jsonl", lines[0], "", *lines[1:], {"messages": [{"role": "user", "content": "Hi"}]})
    found = read_samples(read_checkpoint(model), settings(model, tmp_path, calibration=str(path), samples=9), 512)
    assert len(found) == 4 and found[0].token_ids == found[1].token_ids == found[2].token_ids
    assert found[0].spans[0].pixels.digest == found[1].spans[0].pixels.digest
    first = found[0].is_answer.index(True)
    ends = found[0].token_ids.index(min(read_checkpoint(model).end_token_ids), first)
    assert found[0].is_answer == [first <= i <= ends for i in range(len(found[0].token_ids))] and ends - first > 2
    assert len(found[0].token_ids) == ends + 2 and not any(found[3].is_answer)  # the template's line break is nobody's
    assert len(read_samples(read_checkpoint(model), settings(model, tmp_path, calibration=str(path), samples=2), 512)) == 2


def test_bad_lines_are_named(model: Path, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}]}
    picture = [{"type": "image_url", "image_url": {"url": "none.png"}}]
    remote = [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]
    for line, message in (
        ("{", r"chats.jsonl line 2: not valid JSON"),
        ([], r"line 2: expected an object with messages"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, r"line 2: messages\[0\].role is 'robot'"),
        (
            {"messages": [{"role": "user", "content": picture}]},
            r"line 2: messages\[0\].content\[0\].image_url: cannot read .*none",
        ),
        ({"messages": [{"role": "user", "content": remote}]}, r"line 2: .*download https://example.com/a.png"),
        ({"messages": [{"role": "user", "content": "a" * 700}]}, r"line 2 has \d+ tokens, and the model's context is 64"),
        ("", r"has 1 conversations; expected 2 or more"),
    ):
        path = write_lines(tmp_path / "chats.jsonl", good, line)
        with pytest.raises(ConfigError, match=message):
            read_samples(read_checkpoint(model), settings(model, tmp_path, calibration=str(path)), 64)
