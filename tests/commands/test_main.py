"""The command line: help worth reading, flags from the fields, one answer, a conversation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from tests.vision.test_preprocess import encoded, noise
from vlserve import EngineConfig, MediaConfig, __version__
from vlserve.config import ServerConfig


def vlserve(*arguments: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vlserve", *arguments], capture_output=True, text=True, input=input, timeout=120)


def test_version_and_help() -> None:
    assert vlserve("--version").stdout == f"vlserve {__version__}\n"
    text = vlserve("serve", "--help").stdout
    for config in (EngineConfig, MediaConfig, ServerConfig):
        for field in fields(config):
            if field.name != "model" and field.metadata.get("flag", True):
                assert "--" + field.name.replace("_", "-") in text
    assert "(default: 8000)" in text and "org/name" in text


def test_wrong_usage_is_explained() -> None:
    assert vlserve().returncode == 2
    wrong = vlserve("serve", "--no-such-flag")
    assert wrong.returncode == 2 and "--no-such-flag" in wrong.stderr
    for arguments, message in (
        (("serve", "--port", "99999"), "port is 99999"),
        (("run", "--prompt", "x", "--temperature", "nan"), "temperature is nan"),
        (("run", "/no/where", "--prompt", "x"), "no such folder"),
    ):
        done = vlserve(*arguments)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> str:
    return str(checkpoint("qwen2"))


def test_run_gives_one_answer(model: str, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    picture.write_bytes(encoded(Image.fromarray(noise(60, 30)), "PNG"))
    arguments = ("run", model, "--image", str(picture), "--prompt", "What?", "--max-tokens", "5", "--kv-cache-gib", "0.05")
    document = json.loads(vlserve(*arguments, "--json").stdout)
    assert document["usage"]["completion_tokens"] == len(document["token_ids"]) and document["usage"]["image_tokens"] > 0
    assert vlserve(*arguments).stdout == document["text"] + "\n"
    missing = vlserve("run", model, "--image", "nothing.png", "--prompt", "x", "--kv-cache-gib", "0.05")
    assert missing.returncode == 1 and "cannot read nothing.png" in missing.stderr


def test_chat_keeps_the_conversation_and_survives_mistakes(model: str, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    picture.write_bytes(encoded(Image.fromarray(noise(60, 30)), "PNG"))
    lines = ["/image nowhere.png", "/what", f"/image {picture}", "What?", "And now?", "/clear", "x " * 600, "hi", "/quit"]
    done = vlserve("chat", model, "--max-tokens", "3", "--kv-cache-gib", "0.05", input="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    assert "no such file: 'nowhere.png'" in done.stdout and "commands: /image PATH" in done.stdout
    assert "no room for an answer" in done.stdout


def test_a_reader_that_has_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vlserve", "plan", "demo", "--json"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")
