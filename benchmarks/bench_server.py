"""Times the server on this machine: 16 requests at once against 16 in a row, and start-up against torch's import.

Checks first that both ways give the same answers. Runs alternate, and the figures are medians of ratios, since
machines are noisy. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
from PIL import Image, ImageDraw


def picture(seed: int) -> str:
    """A new picture every time, as a data URL, so that no cache helps."""
    rng = random.Random(seed)
    image = Image.new("RGB", (320, 240), tuple(rng.randint(180, 255) for _ in range(3)))
    x, y = rng.randint(40, 200), rng.randint(40, 120)
    ImageDraw.Draw(image).ellipse((x, y, x + 80, y + 80), fill=tuple(rng.randint(0, 120) for _ in range(3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def served(model: str) -> Iterator[tuple[str, float]]:
    """(base URL, seconds from the command to a healthy server)."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "vlserve", "serve", model, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        base = ""
        for line in process.stderr:
            if match := re.search(r"listening on (http://\S+)", line):
                base = match[1]
            if "is ready" in line:
                break
        # a pipe that nobody empties would fill up with the access lines and stop the server
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield base, time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait()


def ask(client: openai.OpenAI, model: str, seed: int, tokens: int) -> str:
    content = [{"type": "image_url", "image_url": {"url": picture(seed)}}, {"type": "text", "text": "Describe the picture."}]
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].message.content or ""


def concurrency(base: str, model: str, number: int, tokens: int, runs: int) -> tuple[list[float], list[float]]:
    """Seconds for `number` requests in a row, and at once; pictures differ between all runs."""
    row, at_once = [], []
    with openai.OpenAI(base_url=base + "/v1", api_key="none") as client, ThreadPoolExecutor(number) as pool:
        seeds = list(range(number))
        alone = [ask(client, model, seed, tokens) for seed in seeds]
        together = list(pool.map(lambda seed: ask(client, model, seed, tokens), seeds))
        assert alone == together, "answers differ in company: no figures"
        for run in range(runs):
            first = 1000 * (run + 1)
            begun = time.perf_counter()
            for seed in range(first, first + number):
                ask(client, model, seed, tokens)
            row.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            list(pool.map(lambda seed: ask(client, model, seed, tokens), range(first + 500, first + 500 + number)))
            at_once.append(time.perf_counter() - begun)
    return row, at_once


def import_seconds() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()

    with served(args.model) as (base, _):
        row, at_once = concurrency(base, args.model, args.requests, args.tokens, args.runs)
    imports, starts = [], []
    for _ in range(args.runs):
        imports.append(import_seconds())
        with served(args.model) as (_, seconds):
            starts.append(seconds)
    result = {
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "requests": args.requests,
        "tokens": args.tokens,
        "in_a_row_s": round(statistics.median(row), 3),
        "at_once_s": round(statistics.median(at_once), 3),
        "speed_up": round(statistics.median(a / b for a, b in zip(row, at_once, strict=True)), 2),
        "import_torch_s": round(statistics.median(imports), 2),
        "ready_s": round(statistics.median(starts), 2),
        "start_ratio": round(statistics.median(s / i for s, i in zip(starts, imports, strict=True)), 2),
    }
    print(f"{args.requests} requests in a row   {result['in_a_row_s']:8.3f} s")
    print(f"{args.requests} requests at once    {result['at_once_s']:8.3f} s   {result['speed_up']:.2f} times as fast")
    print(f"import torch           {result['import_torch_s']:8.2f} s")
    print(f"serve until healthy    {result['ready_s']:8.2f} s   {result['start_ratio']:.2f} times as long")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
