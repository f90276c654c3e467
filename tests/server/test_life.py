"""Start, failure and end of a server: nothing hangs, nothing is left over, clients in flight hear of it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.checkpoints import edit_json
from tests.prompt.test_build import copy_of
from tests.server.running import RunningServer, chat, running, tiny
from tests.settling import is_alive, wait_until


class InFlight(threading.Thread):
    """One long streaming request; what came of it."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(daemon=True)
        self.url, self.lines, self.begun = server.base + "/v1/chat/completions", list[str](), threading.Event()
        self.start()

    def run(self) -> None:
        body = chat("hi", max_tokens=490, ignore_eos=True, stream=True)
        try:
            with httpx2.stream("POST", self.url, json=body, timeout=60) as response:
                for line in response.iter_lines():
                    self.lines.append(line)
                    self.begun.set()
        except httpx2.HTTPError as error:
            self.lines.append(f"{type(error).__name__}")

    def last(self) -> str:
        self.join(timeout=60)
        assert not self.is_alive(), "the client was left waiting"
        return next(line for line in reversed(self.lines) if line)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(map(is_alive, processes))


@pytest.fixture
def slow(checkpoint: Callable[..., Path]) -> tuple[str, ...]:
    """A server whose steps are slow enough to be caught in the middle of one answer."""
    return (*tiny(checkpoint("qwen2")), "--threads", "1")


@pytest.mark.parametrize("number,status", [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_everything_and_tells_the_client(
    slow: tuple[str, ...], number: int, status: int, temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(temp))
    with running(*slow, "--drain-seconds", "0") as server:
        server.wait_ready()
        ranks = server.ranks()
        assert len(ranks) == 1
        clients = [InFlight(server) for _ in range(8)]
        for client in clients:
            client.begun.wait(30)
        os.killpg(server.process.pid, number)  # as the terminal does: the rank gets it too
        told = [client.last() for client in clients]
        assert server.wait() in (0, status, 128 + number)
        wait_until(lambda: gone(ranks))
    for line in told:
        finished = line == "data: [DONE]"
        assert finished or json.loads(line.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
    assert not list(temp.iterdir()), "the private folder is gone"


def test_killing_the_rank_tells_the_client_and_ends_the_server_with_an_error(slow: tuple[str, ...]) -> None:
    with running(*slow) as server:
        server.wait_ready()
        clients = [InFlight(server) for _ in range(8)]
        for client in clients:
            client.begun.wait(30)
        server.ranks()[0].kill()
        told = [client.last() for client in clients]
        assert server.wait() == 1
    assert any("killed by signal 9" in line for line in told), told
    assert any("killed by signal 9" in line for line in server.lines)


def test_killing_the_front_leaves_no_rank_behind(slow: tuple[str, ...]) -> None:
    with running(*slow) as server:
        server.wait_ready()
        ranks = server.ranks()
        client = InFlight(server)
        client.begun.wait(30)
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until(lambda: gone(ranks))
        assert client.last()


def test_a_signal_while_loading(slow: tuple[str, ...]) -> None:
    with running(*slow) as server:
        health = httpx2.get(server.base + "/health")
        assert health.status_code == 503 and health.json()["status"] == "loading" and health.json()["stage"]
        assert health.headers["Retry-After"] == "5"
        refused = httpx2.post(server.base + "/v1/chat/completions", json=chat("hi"))
        assert refused.status_code == 503 and "loading" in refused.json()["error"]["message"] and refused.headers["Retry-After"]
        assert httpx2.get(server.base + "/live").status_code == 200
        ranks = server.ranks()
        server.process.send_signal(signal.SIGINT)
        server.wait()
        wait_until(lambda: gone(ranks))


def broken(folder: Path, target: Path, kind: str) -> Path:
    copy = copy_of(folder, target)
    if kind == "weights":
        (copy / "model.safetensors").unlink()
    elif kind == "tokenizer":
        (copy / "tokenizer.json").unlink()
    elif kind == "architecture":
        edit_json(copy / "config.json", model_type="blip", architectures=["Blip"])
    elif kind == "missing":
        from safetensors.torch import load_file, save_file

        weights = load_file(copy / "model.safetensors")
        del weights["vision_tower.embeddings.cls_token"]
        save_file(weights, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize(
    "kind,message",
    [
        ("weights", "checkpoint file missing: model.safetensors"),
        ("tokenizer", "checkpoint file missing: tokenizer.json"),
        (
            "architecture",
            "model_type 'blip'.* is not supported; supported: gpt_oss, internlm2, internlm3, internvl, internvl_chat",
        ),
        ("missing", "weights missing.*vision_tower.embeddings.cls_token"),
    ],
)
def test_a_broken_checkpoint_is_explained_in_one_line(
    kind: str, message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with running(*tiny(broken(checkpoint("qwen2"), tmp_path, kind))) as server:
        server.wait_for("error: .*" + message)
        assert server.wait() == 1
        assert not any("Traceback" in line for line in server.lines), server.lines


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("nowhere/at/all",), "no such folder"),
        (("--tp", "3"), "tp=3 does not work: num_key_value_heads 2 is not divisible by 3"),
        (
            ("--kv-cache-gib", "0.00001"),
            r"set kv_cache_gib \(--kv-cache-gib\) to 0.01 or more, or max_model_len \(--max-model-len\) to 16 or less$",
        ),
        (("--max-model-len", "9999999"), r"the checkpoint's limit, 512 \(max_position_embeddings\)\. Give 512 or less"),
        (("--gpu-memory-utilization", "3"), "gpu_memory_utilization is 3"),
    ],
)
def test_wrong_options_are_explained(arguments: tuple[str, ...], message: str, checkpoint: Callable[..., Path]) -> None:
    model = () if not arguments[0].startswith("--") else (str(checkpoint("qwen2")),)
    with running(*model, *arguments) as server:
        server.wait_for("error: .*" + message)
        assert server.wait() == 1
