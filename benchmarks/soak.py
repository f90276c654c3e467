"""Runs a server for long and sees whether it stays as it was: memory, open files, nothing stuck, no errors, nothing left over.

    python benchmarks/soak.py [MODEL] [--number 20000] [--tp 2]      short requests: text, pictures, clients that leave
    python benchmarks/soak.py [MODEL] --start-stop [--number 24]     one start and stop after the other

Prints what it saw and one line of JSON; exits with status 1 when something grew, stuck, failed or was left over.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from PIL import Image

AT_ONCE, STUCK_S, SAMPLES = 16, 120.0, 10
GROWTH_MIB, GROWTH_FILES = 30, 8  # of one process, between the first tenth and the end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--number", type=int, help="requests (default 20000), or starts (default 24)")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="send no more requests after so long")
    parser.add_argument("--start-stop", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # the server's, so that what it leaves there is seen
        if options.start_stop:
            return start_stop(options, Path(folder))
        return asyncio.run(soak(options))


class Server:
    """`vlserve serve` on two ranks, on a free port."""

    def __init__(self, model: str, tp: int) -> None:
        command = [
            sys.executable,
            "-m",
            "vlserve.commands.main",
            "serve",
            model,
            "--port",
            "0",
            "--tp",
            str(tp),
            "--device",
            "cpu",
        ]
        command += ["--kv-cache-gib", "0.03", "--max-model-len", "1024", "--vision-cache-gib", "0.005", "--threads", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.lines: list[str] = []
        self.base = ""
        while not self.base:
            line = self.process.stderr.readline()
            if not line:
                raise SystemExit(f"the server did not start: {''.join(self.lines)}")
            self.lines.append(line)
            match = re.search(r"listening on (http://\S+)", line)
            self.base = match[1] if match else ""
        threading.Thread(target=lambda: [None for _ in self.process.stderr or ()], daemon=True).start()

    def wait_ready(self) -> None:
        while httpx2.get(self.base + "/health").status_code != 200:
            assert self.process.poll() is None, "the server ended while loading"
            time.sleep(0.1)

    def processes(self) -> dict[str, psutil.Process]:
        """The front and the ranks, by name."""
        front = psutil.Process(self.process.pid)
        ranks = [p for p in front.children(recursive=True) if "vlserve.rank" in p.cmdline()]
        return {"front": front, **{f"rank {i}": p for i, p in enumerate(sorted(ranks, key=lambda p: p.pid))}}

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=60)


def start_stop(options: argparse.Namespace, folder: Path) -> int:
    number, faults = options.number or 24, Counter[str]()
    seconds: list[float] = []
    for turn in range(number):
        begun = time.monotonic()
        server = Server(options.model, options.tp)
        server.wait_ready()
        processes = list(server.processes().values())
        shared = [Path(f.path).parent for f in processes[0].open_files() if f.path.endswith("vlserve.lock")]
        answer = httpx2.post(server.base + "/v1/chat/completions", json=text_body(random.Random(turn)), timeout=STUCK_S)
        faults["answer"] += answer.status_code != 200
        faults["exit status"] += server.stop() not in (0, -15, 143)
        faults["processes"] += sum(p.is_running() for p in processes)
        faults["folders"] += sum(path.exists() for path in shared) + len(list(folder.glob("vlserve-*"))) + (len(shared) != 2)
        seconds.append(time.monotonic() - begun)
        print(f"{turn + 1:3d}: {seconds[-1]:.1f} s, faults so far: {+faults}", flush=True)
    print(json.dumps({"starts": number, "faults": +faults, "mean_s": round(sum(seconds) / number, 1)}))
    return 1 if +faults else 0


def measure(server: Server) -> dict[str, tuple[float, float, int]]:
    """(RSS MiB, USS MiB, open file descriptors) of each process."""
    found = {}
    for name, process in server.processes().items():
        memory = process.memory_full_info()
        found[name] = (memory.rss / 2**20, memory.uss / 2**20, process.num_fds())
    return found


async def soak(options: argparse.Namespace) -> int:
    number = options.number or 20000
    server = Server(options.model, options.tp)
    server.wait_ready()
    rng, outcomes, samples = random.Random(0), Counter[str](), []
    begun, sent = time.monotonic(), 0
    try:
        async with httpx2.AsyncClient(
            base_url=server.base, timeout=STUCK_S, limits=httpx2.Limits(max_connections=AT_ONCE)
        ) as client:
            for part in range(SAMPLES):
                # with a time limit the tenths are of the time, else of the number
                until = begun + options.seconds * (part + 1) / SAMPLES
                share = number - sent if options.seconds < float("inf") else number // SAMPLES
                sent += await crowd(client, rng, share, until, outcomes)
                await asyncio.sleep(0.5)
                samples.append(measure(server))
                took, row = (
                    time.monotonic() - begun,
                    "  ".join(f"{name} {rss:.0f}/{uss:.0f} MiB {files} files" for name, (rss, uss, files) in samples[-1].items()),
                )
                print(f"{sent:6d} requests, {took:4.0f} s: {row}  {dict(outcomes)}", flush=True)
        left = figures(server.base)
    finally:
        status = server.stop()
    growth = {
        name: {kind: round(samples[-1][name][i] - samples[0][name][i], 1) for i, kind in enumerate(("rss", "uss", "files"))}
        for name in samples[0]
    }
    bad = sum(count for kind, count in outcomes.items() if kind.startswith(("error", "stuck")))
    grown = any(g["uss"] > GROWTH_MIB or g["files"] > GROWTH_FILES for g in growth.values())
    print(json.dumps({"requests": sent, "outcomes": outcomes, "left": left, "growth_mib": growth, "exit_status": status}))
    return 1 if bad or grown or any(left.values()) else 0


async def crowd(client: httpx2.AsyncClient, rng: random.Random, number: int, until: float, outcomes: Counter[str]) -> int:
    """So many requests, AT_ONCE at a time, or fewer when the time is up; returns how many."""
    sent = 0

    async def work() -> None:
        nonlocal sent
        while sent < number and time.monotonic() < until:
            sent += 1
            kind = rng.choices(("text", "picture", "leaves"), (5, 3, 2))[0]
            body = text_body(rng) if kind == "text" or (kind == "leaves" and rng.random() < 0.5) else picture_body(rng)
            try:
                outcome = await (leave(client, body, rng) if kind == "leaves" else ask(client, body))
            except httpx2.TimeoutException:
                outcome = "stuck"
            except httpx2.HTTPError as error:
                outcome = f"error {type(error).__name__}"
            outcomes[kind if outcome == "ok" else outcome] += 1

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return sent


async def ask(client: httpx2.AsyncClient, body: dict[str, Any]) -> str:
    answer = await client.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        return f"error {answer.status_code}"
    whole = answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
    return "ok" if whole else "error: not whole"


async def leave(client: httpx2.AsyncClient, body: dict[str, Any], rng: random.Random) -> str:
    """Streams, and goes away after a moment."""
    stay = rng.randrange(5)
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True, "max_tokens": 64}) as answer:
        if answer.status_code != 200:
            return f"error {answer.status_code}"
        async for line in answer.aiter_lines():
            if '"error"' in line:
                return "error in a stream"
            stay -= 1
            if stay < 0:
                break
    return "ok"


def text_body(rng: random.Random) -> dict[str, Any]:
    words = " ".join(rng.choice(("red", "blue", "circle", "what", "two")) for _ in range(rng.randrange(1, 30)))
    return {"messages": [{"role": "user", "content": words}], "max_tokens": rng.randrange(1, 9), "ignore_eos": True}


def picture_body(rng: random.Random) -> dict[str, Any]:
    """Half of the pictures were seen before."""
    seed = rng.randrange(20) if rng.random() < 0.5 else rng.randrange(20, 10**9)
    noise = np.random.default_rng(seed)
    shape = (*noise.integers(20, 80, 2), 3)
    with contextlib.closing(io.BytesIO()) as buffer:
        Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    body = text_body(rng)
    body["messages"][0]["content"] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": body["messages"][0]["content"]},
    ]
    return body


def figures(base: str) -> dict[str, float]:
    """What is still open in the server."""
    text = httpx2.get(base + "/metrics").text
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: float(re.search(rf"^vlserve:{name}{{.*}} (\S+)$", text, re.M)[1]) for name in names}  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
