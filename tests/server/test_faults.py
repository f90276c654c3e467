"""The fault table of a server on two ranks: signals in every stage, the front killed, the ports that are open."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.ranks.faults import Clock, own_folders, ranks_of
from tests.server.running import RunningServer, running, tiny
from tests.server.test_life import InFlight
from tests.settling import is_alive, wait_until
from vlserve.engine.messages import STAGES

pytestmark = pytest.mark.usefixtures("places")


@pytest.fixture
def command(checkpoint: Callable[..., Path]) -> tuple[str, ...]:
    return (*tiny(checkpoint("qwen2")), "--tp", "2", "--device", "cpu", "--threads", "1")


def check_end(server: RunningServer, clock: Clock, number: int, folders: list[Path]) -> None:
    status = server.wait()
    clock.stop(f"exit status {status}", limit_s=0)
    server.kill()  # all of its output has been read then
    assert status in (0, -number, 128 + number)
    assert not any("Traceback" in line or "KeyboardInterrupt" in line for line in server.lines), "".join(server.lines)
    assert len(folders) == 2 and not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_ctrl_c_while_loading(stage: str, hold: Callable[..., None], command: tuple[str, ...]) -> None:
    def in_stage() -> bool:
        ranks = client.get(server.base + "/health").json()["ranks"]
        return any(entry["rank"] == 1 and entry["stage"] == stage and entry["seconds"] >= 0 for entry in ranks)

    hold(stage)
    with running(*command) as server, httpx2.Client() as client:
        wait_until(in_stage, stage)
        folders = own_folders(server.process.pid)
        clock = Clock(f"Ctrl-C in stage {stage!r}")
        os.killpg(server.process.pid, signal.SIGINT)
        check_end(server, clock, signal.SIGINT, folders)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_step(number: int, command: tuple[str, ...]) -> None:
    with running(*command, "--drain-seconds", "0") as server:
        server.wait_ready()
        folders, client = own_folders(server.process.pid), InFlight(server)
        client.begun.wait(30)
        clock = Clock(f"{signal.Signals(number).name} in decoding")
        os.killpg(server.process.pid, number)
        told = client.last()
        assert told == "data: [DONE]" or "the server is shutting down" in told
        check_end(server, clock, number, folders)


def test_the_front_killed(command: tuple[str, ...], places: Path) -> None:
    with running(*command) as server:
        server.wait_ready()
        ranks, folders = ranks_of(server.process.pid), own_folders(server.process.pid)
        client = InFlight(server)
        client.begun.wait(30)
        ranks[1].suspend()  # a rank that cannot end by itself
        clock = Clock("kill -9 of the front")
        os.kill(server.process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, ranks)), "the ranks end")
        clock.stop("the ranks are gone; " + client.last(), limit_s=0)
    assert len(folders) == 2 and places in folders[0].parents and folders[0].exists()  # the other: any start may remove it
    with running(*command) as server:
        assert server.base and not any(folder.exists() for folder in folders), "the next start removes them"
        server.process.send_signal(signal.SIGTERM)
        server.wait()


def test_only_the_http_port_is_open_and_only_on_loopback(command: tuple[str, ...]) -> None:
    with running(*command) as server:
        server.wait_ready()
        front = psutil.Process(server.process.pid)
        listening = [c.laddr for p in (front, *ranks_of(front.pid)) for c in p.net_connections() if c.status == "LISTEN"]
        assert int(server.base.rpartition(":")[2]) in [address.port for address in listening]
        assert {address.ip for address in listening} == {"127.0.0.1"}
        server.process.send_signal(signal.SIGTERM)
        server.wait()
