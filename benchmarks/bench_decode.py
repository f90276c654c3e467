"""Times decoding of several checkpoints side by side: tokens a second at each batch size, and the bytes of their weights.

    python benchmarks/bench_quantize.py --folder models        # makes the two that follow
    python benchmarks/bench_decode.py models/bf16 models/awq

All engines run at once and take turns, so that a slow minute of the machine hits all of them; ratios are medians of the pairs
of one turn. The first folder is what the others are compared with. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from vlserve import VLPipeline

PROMPT = "Describe what you know about shapes and colours."


def decode(pipe: VLPipeline, batch: int, tokens: int) -> float:
    """Tokens a second of `batch` answers at once, from the first token of all to the last."""
    answers = pipe([f"{i}. {PROMPT}" for i in range(batch)], max_tokens=tokens, ignore_eos=True)
    first, last = min(answer.timing.ttft_s for answer in answers), max(answer.timing.total_s for answer in answers)
    return batch * (tokens - 1) / (last - first)


def weight_bytes(pipe: VLPipeline) -> dict[str, int]:
    stats = pipe.client.stats
    assert stats is not None
    return {kind: value for kind, value in stats.device_bytes[0].items() if value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()

    results = []
    with ExitStack() as stack:
        pipes = {
            str(model): stack.enter_context(VLPipeline(str(model), dtype=args.dtype, kv_cache_gib=0.25)) for model in args.models
        }
        sizes = {}
        for name, pipe in pipes.items():
            decode(pipe, max(args.batches), 4)
            sizes[name] = weight_bytes(pipe)
            print(name, ", ".join(f"{kind} {value / 1e6:.1f} MB" for kind, value in sizes[name].items()))
        base, *others = pipes
        for batch in args.batches:
            rates: dict[str, list[float]] = {name: [] for name in pipes}
            for turn in range(-1, args.turns):  # the first warms up
                for name, pipe in pipes.items():
                    rate = decode(pipe, batch, args.tokens)
                    if turn >= 0:
                        rates[name].append(rate)
            row: dict[str, Any] = {"batch": batch, "tokens_per_s": {name: round(median(r), 1) for name, r in rates.items()}}
            row["times_as_fast"] = {
                name: round(median(a / b for a, b in zip(rates[name], rates[base], strict=True)), 2) for name in others
            }
            results.append(row)
            ratios = "; ".join(
                f"{Path(name).name} {ratio:.2f} times {Path(base).name}" for name, ratio in row["times_as_fast"].items()
            )
            rows = ", ".join(f"{Path(name).name} {rate:.1f}" for name, rate in row["tokens_per_s"].items())
            print(f"batch {batch}: tokens a second {rows}; {ratios}", flush=True)
    print(json.dumps({"machine": platform.machine(), "dtype": args.dtype, "bytes": sizes, "results": results}))


if __name__ == "__main__":
    main()
