"""`on_rank_failure` restart: ranks come back, requests that waited are answered, and what fails for ever ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from PIL import Image

import vlserve.ranks.supervisor
from tests.ranks.faults import MARK, Clock, add_path, nothing_left, own_folders, pipeline, ranks_of, write_plugin
from tests.server.running import RunningServer, chat, running, tiny
from tests.server.test_life import InFlight
from tests.settling import wait_until
from tests.vision.test_preprocess import noise
from vlserve import EngineError


def num_waiting(client: httpx2.Client, server: RunningServer) -> float:
    lines = client.get(server.base + "/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("vlserve:num_requests_waiting"))


def test_requests_that_waited_are_answered_on_the_same_port(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    options = ("--tp", "2", "--device", "cpu", "--threads", "1", "--max-num-seqs", "8", "--on-rank-failure", "restart")
    with running(*tiny(checkpoint("qwen2")), *options) as server, ThreadPoolExecutor(8) as pool, httpx2.Client() as http:
        server.wait_ready()
        base, folders, ranks = server.base, own_folders(server.process.pid), ranks_of(server.process.pid)
        streaming = [InFlight(server) for _ in range(8)]
        for client in streaming:
            client.begun.wait(60)
        body = chat("hi", max_tokens=4, ignore_eos=True)
        waiting = [pool.submit(httpx2.post, base + "/v1/chat/completions", json=body, timeout=300) for _ in range(8)]
        wait_until(lambda: num_waiting(http, server) == 8, "eight requests wait")
        clock = Clock("restart: rank 1 killed in decoding, 8 stream and 8 wait")
        ranks[1].kill()
        clock.stop("begun: " + streaming[0].last(), limit_s=0)
        assert all("rank 1 ended (killed by signal 9)" in client.last() for client in streaming)
        health = http.get(base + "/health")
        assert health.status_code == 503 and {rank["rank"] for rank in health.json()["ranks"]} <= {0, 1}
        refused = http.post(base + "/v1/chat/completions", json=body)
        assert refused.status_code == 503 and refused.headers["Retry-After"]
        wait_until(lambda: http.get(base + "/health").status_code == 200, "the server serves again")
        answers = [future.result() for future in waiting]
        print(f"FAULT | restart, until it serves again | {time.monotonic() - clock.begun:.1f} s | {len(answers)} waited")
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [4] * 8
        assert httpx2.post(base + "/v1/chat/completions", json=body, timeout=60).status_code == 200
        assert not {rank.pid for rank in ranks} & {rank.pid for rank in ranks_of(server.process.pid)}
        server.process.terminate()
        server.wait()
    nothing_left(str(tmp_path))
    assert not any(folder.exists() for folder in folders)


def test_a_request_that_ends_its_rank_every_time_gets_an_error_and_ranks_that_go_on_so_are_given_up(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site, folder = write_plugin(tmp_path / "site", checkpoint("qwen2"))
    monkeypatch.syspath_prepend(site)
    add_path(monkeypatch.setenv, site)
    monkeypatch.setenv("VLSERVE_STEP", "kill")
    monkeypatch.setenv(MARK, str(tmp_path))
    monkeypatch.setattr(vlserve.ranks.supervisor, "MAX_RESTARTS", vlserve.ranks.client.MAX_ATTEMPTS)
    errors: list[str] = []
    with pipeline(folder, on_rank_failure="restart") as pipe:

        def ask() -> None:
            try:
                pipe(("What?", Image.fromarray(noise(30, 120))), max_tokens=4)
            except EngineError as error:
                errors.append(str(error))

        pipe.wait_ready()
        clock = Clock("restart: a request that kills rank 1 each time")
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout=240)
        assert not thread.is_alive() and pipe.client.num_restarts == vlserve.ranks.client.MAX_ATTEMPTS
        assert "rank 1 ended (killed by signal 9)" in clock.stop(errors[0], limit_s=120)
        pipe.client.wait_ready()
        assert pipe("hi", max_tokens=2).token_ids, "others are answered"
        assert not any(list(path.iterdir()) for path in pipe.client._pixels.folders[1:])
        clock = Clock("restart: rank 0 killed once more than it is started again")
        ranks_of(os.getpid())[0].kill()
        text = clock.wait_error(pipe, limit_s=0)
        assert "rank 0 ended (killed by signal 9)" in text and "started again 2 time" in text
        with pytest.raises(EngineError, match="killed by signal 9"):
            pipe("hi")
    nothing_left(str(tmp_path))
