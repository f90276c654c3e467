"""The system's refusals: told apart, and raised limits."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlserve.commands.main import _parser, main
from vlserve.config import MediaConfig
from vlserve.errors import EngineError, RequestError
from vlserve.media.decode import decode_image
from vlserve.media.fetch import Fetcher, _ssl_context
from vlserve.media.sources import read_source
from vlserve.prompt.chat_messages import ImagePart
from vlserve.system_limits import describe, find_refusal, refused
from vlserve.timing import PreparationClock

FULL = "^the server has too many files and connections open; try again later$"


@contextmanager
def no_more_files() -> Iterator[None]:
    """As if this process had used up its descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(first := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (first, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_refusal_is_found_in_whatever_it_was_wrapped_in() -> None:
    inner = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/some/path")
    outer = RuntimeError("all attempts failed")
    outer.__cause__ = several = OSError("several")
    several.exceptions = (OSError(errno.ECONNREFUSED, "refused"), inner)  # type: ignore[attr-defined]  # as an ExceptionGroup's
    assert find_refusal(outer) == errno.EMFILE and find_refusal(MemoryError()) == errno.ENOMEM
    for other in (OSError(errno.ECONNREFUSED, "refused"), PermissionError(errno.EACCES, "x"), ValueError("x")):
        assert find_refusal(other) is None and refused(other, "x") is None
    assert "ulimit -n" in describe(outer) and "/some/path" not in describe(outer)
    assert describe(FileNotFoundError(errno.ENOENT, "No such file", "/a/path")) == "No such file"


def test_pictures_are_not_blamed_for_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(path)
    config = MediaConfig(allowed_local_media_path=str(tmp_path))
    for local in (False, True):
        with no_more_files(), pytest.raises(EngineError, match=FULL):
            read_source(ImagePart(source=f"file://{path}", param="messages", local=local), config)

    def no_memory(image: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(EngineError, match="^the server is out of memory; try again later$"):
        patch.setattr(Image.Image, "load", no_memory)
        decode_image(Image.new("RGB", (4, 4)), param="messages")

    async def fetch(url: str) -> None:
        fetcher = Fetcher(MediaConfig(allow_private_media=True))
        _ssl_context()  # reads files
        with no_more_files():
            await fetcher.fetch_all([(url, "messages")], lambda count, param: None, PreparationClock())

    for url in ("http://127.0.0.1:1/x.png", "http://localhost:1/x.png"):
        with pytest.raises(EngineError, match=FULL):
            asyncio.run(fetch(url))


def test_a_start_without_descriptors_is_explained(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlserve.commands.main.raise_open_files", lambda: None)  # as if the hard limit were as low
    _parser()  # imports its tools
    with no_more_files():
        assert main(["serve", "demo", "--port", "0"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("vlserve: error: the server has too many files") and "ulimit -n" in told


def test_the_soft_limit_of_open_files_is_raised() -> None:
    code = (
        "import resource as r, vlserve.system_limits as s; h = r.getrlimit(r.RLIMIT_NOFILE)[1];"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, h)); s.raise_open_files();"
        "print(r.getrlimit(r.RLIMIT_NOFILE)[0] == (65536 if h < 0 else min(h, 65536)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "True\n"


def test_a_refused_picture_names_the_operators_option_in_the_log_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vlserve")
    for folder, url in ((None, "file:///etc/secret.png"), (str(tmp_path), "file:///etc/secret.png")):
        with pytest.raises(RequestError) as error:
            read_source(ImagePart(source=url, param="messages", local=False), MediaConfig(allowed_local_media_path=folder))
        assert "--" not in str(error.value) and "--allowed-local-media-path" in caplog.text
        caplog.clear()

    async def fetch(config: MediaConfig) -> None:
        fetcher = Fetcher(config, look_up=lambda host, port: ["10.1.2.3"])
        await fetcher.fetch_all([("http://secret.example/x.png", "messages")], lambda count, param: None, PreparationClock())

    for config, option in (
        (MediaConfig(), "--allow-private-media"),
        (MediaConfig(denied_media_hosts=("secret.example",)), "--denied"),
    ):
        with pytest.raises(RequestError) as error:
            asyncio.run(fetch(config))
        assert "--" not in str(error.value) and option in caplog.text and "secret" not in caplog.text
        caplog.clear()
