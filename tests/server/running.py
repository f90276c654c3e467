"""A real server in a process of its own, for tests that speak HTTP to it or hurt it."""

from __future__ import annotations

import base64
import io
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
from PIL import Image

from tests.settling import PATIENCE_S, wait_until


class RunningServer:
    """`vlserve serve` with its output; `base` is the address once it listens."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vlserve", "serve", *arguments, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        self._base = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line)
                self._new.put(line)
        self._new.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line with `pattern`; fails when the server ends first."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            line = self._new.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, f"the server ended before {pattern!r}: {''.join(self.lines)}"
            if match := re.search(pattern, line):
                return match

    @property
    def base(self) -> str:
        if not self._base:
            self._base = self.wait_for(r'listening on (http://[^\s"]+)')[1]
        return self._base

    def wait_ready(self) -> None:
        base = self.base
        with httpx2.Client(timeout=PATIENCE_S) as client:  # one for all tries: making one reads all certificates of the system
            wait_until(lambda: client.get(base + "/health").status_code == 200)

    def ranks(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if "vlserve.rank" in " ".join(p.cmdline())]

    def wait(self) -> int:
        return self.process.wait(timeout=PATIENCE_S)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(timeout=10)


@contextmanager
def running(*arguments: str) -> Iterator[RunningServer]:
    server = RunningServer(*arguments)
    try:
        yield server
    finally:
        server.kill()


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(text: str, *images: Image.Image, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], "max_tokens": 8, **fields}


def tiny(folder: Path) -> tuple[str, ...]:
    return (str(folder), "--dtype", "float32", "--served-model-name", "tiny", "--kv-cache-gib", "0.05")
