"""Hurts a server and checks that it is whole afterwards: clients that leave at random moments, a flood against a short
queue, a reader that does not read.

    python benchmarks/stress_server.py [--clients 500] [--flood 2000]

Prints what it saw, and exits with status 1 when something was left over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import httpx2
import psutil

QUEUE, RUNNING = 64, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500, help="clients that leave")
    parser.add_argument("--flood", type=int, default=2000, help="requests against a queue of 64")
    options = parser.parse_args()
    command = [sys.executable, "-m", "vlserve", "serve", "--port", "0"]
    command += ["--max-queue", str(QUEUE), "--max-num-seqs", str(RUNNING), "--kv-cache-gib", "0.3"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    base = ""
    while not base:
        match = re.search(r"listening on (http://\S+)", process.stderr.readline())
        base = match[1] if match else ""
    threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
    try:
        while httpx2.get(base + "/health").status_code != 200:
            time.sleep(0.1)
        checks = [leaving(base, process.pid, options.clients), asyncio.run(flood(base, options.flood)), slow_reader(base)]
        return 0 if all(checks) else 1
    finally:
        process.terminate()
        process.wait()


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Describe the picture."}], "ignore_eos": True, "max_tokens": 200, **fields}


def ask(base: str) -> float:
    begun = time.monotonic()
    httpx2.post(base + "/v1/chat/completions", json=body(max_tokens=20), timeout=300).raise_for_status()
    return time.monotonic() - begun


def figures(base: str) -> dict[str, float]:
    text = httpx2.get(base + "/metrics").text
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: float(re.search(rf"^vlserve:{name}{{.*}} (\S+)$", text, re.M)[1]) for name in names}  # type: ignore[index]


def memory(pid: int) -> int:
    """MiB of the server and its rank."""
    main = psutil.Process(pid)
    return sum(p.memory_info().rss for p in [main, *main.children(recursive=True)]) // 2**20


def leaving(base: str, pid: int, number: int) -> bool:
    host, port = base.removeprefix("http://").split(":")
    rng = random.Random(0)

    def leave(stream: bool, share: float, wait: float) -> None:
        data = json.dumps(body(stream=stream)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall((head + data)[: int(share * len(head + data))])
            connection.settimeout(wait)
            with contextlib.suppress(TimeoutError):
                connection.recv(100)

    alone = statistics.median(ask(base) for _ in range(5))
    for _ in range(20):  # what a first crowd allocates once
        leave(True, 1.0, 0.1)
    before = memory(pid)
    plans = [(rng.random() < 0.5, rng.choice((1.0, 1.0, rng.random())), rng.uniform(0.001, 0.5)) for _ in range(number)]
    for first in range(0, number, 50):
        threads = [threading.Thread(target=leave, args=plan) for plan in plans[first : first + 50]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    begun = time.monotonic()
    while any((left := figures(base)).values()) and time.monotonic() - begun < 60:
        time.sleep(0.05)
    settled = time.monotonic() - begun
    after = statistics.median(ask(base) for _ in range(5))
    grown = memory(pid) - before
    print(f"{number} clients left: {left} after {settled:.2f} s; memory {grown:+d} MiB")
    print(f"an answer then took {after:.2f} s, and {alone:.2f} s before")
    return not any(left.values()) and grown < 100


async def flood(base: str, number: int) -> bool:
    async with httpx2.AsyncClient(timeout=600, limits=httpx2.Limits(max_connections=400)) as client:

        async def one() -> tuple[int, bool]:
            answer = await client.post(base + "/v1/chat/completions", json=body(max_tokens=8))
            whole = answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] == 8
            return answer.status_code, whole and (answer.status_code != 429 or "retry-after" in answer.headers)

        begun = time.monotonic()
        answers = await asyncio.gather(*(one() for _ in range(number)))
    counts = Counter(code for code, _ in answers)
    print(f"{number} requests against a queue of {QUEUE}: {dict(counts)} in {time.monotonic() - begun:.1f} s")
    return set(counts) <= {200, 429} and all(good for _, good in answers)


def slow_reader(base: str) -> bool:
    """One client asks for long streams and never reads them; the others' time must not change."""
    host, port = base.removeprefix("http://").split(":")
    alone = statistics.median(ask(base) for _ in range(5))
    data = json.dumps(body(stream=True, max_tokens=8000, logprobs=True, top_logprobs=20)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head + data)
        time.sleep(1)
        beside = statistics.median(ask(base) for _ in range(5))
    print(f"beside a reader that does not read: {beside:.2f} s, alone {alone:.2f} s")
    return beside < 4 * alone + 1


if __name__ == "__main__":
    sys.exit(main())
