"""Replicas behind Ray Serve, under load, while their processes are killed: what is lost, and what comes back.

Needs Ray: install examples/ray_constraints.txt's beside vlserve and pytest. With -s it prints what it counted.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.server.running import chat
from tests.settling import PATIENCE_S, is_alive, wait_until

if find_spec("ray") is None:
    pytest.skip("Ray is not installed; examples/ray_serve.py says how", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "examples/ray_serve.py"


class Service:
    """examples/ray_serve.py on a free port, once it listens."""

    def __init__(self, log: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.base = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = self.base.rpartition(":")[2]
        command = [sys.executable, str(SCRIPT), "--port", port, "-o", "kv_cache_gib=0.1", *arguments]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self.ray = psutil.Process(self.process.pid)

    def wait_ready(self) -> None:
        wait_until(lambda: "listening on" in self.output or self.process.poll() is not None, "listening")
        assert self.process.poll() is None, self.output

    @property
    def output(self) -> str:
        return self.log.read_text()

    def replicas(self) -> list[psutil.Process]:
        return [process for process in self.ray.children(recursive=True) if has(process, "ray::ServeReplica")]

    def ranks(self) -> list[psutil.Process]:
        return [process for process in self.ray.children(recursive=True) if has(process, "vlserve.rank")]

    def end(self, number: int) -> int:
        """Send the signal to the script alone; its exit status, once all its processes are gone."""
        everything = self.ray.children(recursive=True)
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE_S)
        wait_until(lambda: not any(map(is_alive, everything)), "Ray's processes end")
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            for process in [*self.ray.children(recursive=True), self.process]:
                process.kill()
            self.process.wait()


def has(process: psutil.Process, word: str) -> bool:
    try:
        return word in " ".join(process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[Service]:
    service = Service(log, *arguments)
    try:
        service.wait_ready()
        yield service
    finally:
        service.kill()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    flags = (
        "--min-replicas 2 --max-replicas 3 --cpus-per-rank 0.5 --target-ongoing-requests 6 --upscale-delay-s 2 --health-check-s 2"
    )
    with serving(tmp_path_factory.mktemp("ray") / "log", *flags.split()) as service:
        yield service


@dataclass(kw_only=True)
class Sent:
    """One request and what became of it."""

    stream: bool
    begun: float
    ended: float = 0.0
    status: int = 0  # 0: the connection broke before there was one
    replica: str | None = None  # that answered; None when Ray's proxy did
    error: str | None = None

    def ask(self, client: httpx2.Client, num_tokens: int) -> None:
        body = chat("Tell me a story.", max_tokens=num_tokens, ignore_eos=True, stream=self.stream)
        body |= {"stream_options": {"include_usage": True}} if self.stream else {}
        try:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                self.status, self.replica = answer.status_code, answer.headers.get("x-replica-id")
                self.error = self._error(answer.read().decode(), num_tokens)
        except httpx2.TransportError as error:
            self.error = f"broken off ({type(error).__name__})"
        finally:
            self.ended = time.monotonic()

    def _error(self, text: str, num_tokens: int) -> str | None:
        if self.status != 200:
            return f"status {self.status}"
        if not self.stream:
            return self._short(json.loads(text), num_tokens)
        pieces = text.strip().split("\n\n")
        if pieces[-1] == "data: [DONE]":
            return self._short(json.loads(pieces[-2].removeprefix("data: ")), num_tokens)
        return "error event" if '"error"' in pieces[-1] else "cut"

    @staticmethod
    def _short(body: dict[str, Any], num_tokens: int) -> str | None:
        """Whether tokens are missing from what claims to be the whole answer."""
        number = body["usage"]["completion_tokens"]
        return None if number == num_tokens else f"{number} tokens of {num_tokens}"


class Load:
    """`number` clients that ask one after the other, each second request streamed, until the block ends."""

    def __init__(self, service: Service, number: int, num_tokens: int = 200) -> None:
        self.service, self.num_tokens = service, num_tokens
        self.sent: list[Sent] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(number)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stop.set()
        deadline = time.monotonic() + PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def _run(self, number: int) -> None:
        with httpx2.Client(base_url=self.service.base, timeout=PATIENCE_S, trust_env=False) as client:
            while not self._stop.is_set():
                sent = Sent(stream=number % 2 == 0, begun=time.monotonic())
                self.sent.append(sent)
                sent.ask(client, self.num_tokens)
                number += 1

    def answering(self, since: float = 0.0) -> set[str]:
        return {sent.replica for sent in self.sent if sent.replica and not sent.error and sent.ended and sent.begun >= since}


def kill_under_load(service: Service, name: str, choose: Callable[[], psutil.Process]) -> tuple[Load, float, set[str]]:
    """Kill a process, see another replica come; the load, the moment of the kill, and who answered before."""
    with Load(service, 8) as load:
        wait_until(lambda: len(load.answering()) == 2 and len(load.sent) > 24, "both replicas answer")
        before = load.answering()
        choose().kill()
        killed = time.monotonic()
        wait_until(lambda: bool(load.answering(killed) - before), "another replica answers")
        replaced = time.monotonic()
        time.sleep(2)  # some more, over both
    failed = [sent for sent in load.sent if sent.error]
    between = [sent for sent in load.sent if killed < sent.begun and sent.ended < replaced and not sent.error]
    open_then = [sent for sent in load.sent if sent.begun < killed < sent.ended]
    kinds = Counter(f"{'streamed' if sent.stream else 'whole'}: {sent.error}, by {sent.replica or 'Ray'}" for sent in failed)
    last = max((sent.ended - killed for sent in failed), default=0.0)
    print(f"\n{name}: {len(load.sent)} sent, {len(load.sent) - len(failed)} answered, {len(failed)} failed {dict(kinds)}")
    print(f"  open at the kill: {len(open_then)}, of which failed: {sum(bool(sent.error) for sent in open_then)}")
    print(f"  begun after the kill and failed: {sum(sent.begun > killed for sent in failed)}; last failure {last:.2f} s after it")
    print(f"  replaced after {replaced - killed:.1f} s; begun and answered in between: {len(between)}")
    assert all(sent.ended for sent in load.sent) and between
    return load, killed, before


def test_a_killed_replica_takes_only_what_it_ran_and_is_replaced(service: Service) -> None:
    load, killed, before = kill_under_load(service, "replica killed", lambda: service.replicas()[0])
    failed = [sent for sent in load.sent if sent.error]
    assert failed and all(sent.begun < killed for sent in failed), "Ray gives what was not taken to another"
    survivors = before & load.answering(killed)
    assert len(survivors) == 1 and not any(sent.replica in survivors for sent in failed)
    assert len(service.replicas()) == len(service.ranks()) == 2


def test_a_replica_whose_rank_is_killed_says_so_and_is_replaced(service: Service) -> None:
    load, killed, before = kill_under_load(service, "rank killed", lambda: service.ranks()[0])
    failed = [sent for sent in load.sent if sent.error]
    survivors = before & load.answering(killed)
    assert failed and len(survivors) == 1
    assert {sent.replica for sent in failed} <= before - survivors | {None}, "only the dead engine's replica may fail requests"
    assert any(sent.error in ("status 503", "error event") for sent in failed), "in the API's own words"
    assert len(service.replicas()) == len(service.ranks()) == 2


def test_load_brings_another_replica(service: Service) -> None:
    with Load(service, 24) as load:
        begun = time.monotonic()
        wait_until(lambda: len(load.answering(begun)) == 3, "a third replica answers")
        print(f"\nthird replica answered after {time.monotonic() - begun:.1f} s of 24 requests at once")
    failed = [sent.error for sent in load.sent if sent.error]
    print(f"{len(load.sent)} sent, {len(failed)} failed")
    assert not failed and len(service.replicas()) == 3


def test_sigterm_lets_open_requests_end(service: Service) -> None:
    with httpx2.Client(base_url=service.base, timeout=PATIENCE_S, trust_env=False) as client:
        open_one = Sent(stream=True, begun=time.monotonic())
        thread = threading.Thread(target=open_one.ask, args=(client, 1500))
        thread.start()
        wait_until(lambda: open_one.status == 200)
        assert service.end(signal.SIGTERM) == 0, service.output
        thread.join(PATIENCE_S)
        assert open_one.error is None, open_one
    assert "Traceback" not in service.output


def test_control_c_ends_everything(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--max-replicas", "1") as service:
        assert httpx2.get(service.base + "/health", trust_env=False).status_code == 200
        everything = service.ray.children(recursive=True)
        os.killpg(service.process.pid, signal.SIGINT)  # as a terminal does
        assert service.process.wait(PATIENCE_S) == 0
        wait_until(lambda: not any(map(is_alive, everything)))
        assert "Traceback" not in service.output


def test_wrong_usage_is_explained() -> None:
    for flags, message in (
        (["--min-replicas", "3", "--max-replicas", "2"], "--min-replicas is 3; expected 1 to --max-replicas 2"),
        (["-o", "kv_cash_gib=1"], "unknown option 'kv_cash_gib'"),
        (["-o", "threads"], "expected NAME=VALUE"),
        (["--gpus-per-rank", "2"], "--gpus-per-rank is 2"),
    ):
        ended = subprocess.run(
            [sys.executable, str(SCRIPT), "--port", "0", *flags], capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert ended.returncode == 2 and message in ended.stderr and "Traceback" not in ended.stderr
