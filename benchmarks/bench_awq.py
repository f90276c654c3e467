"""Times 4-bit layers and an 8-bit head against dense ones in bfloat16, in the shapes of InternVL3-1B.

Checks first that each gives what its definition gives. Every layer has several copies of its weights, more than the processor's
caches hold, as in a model, where each layer is read once a step. Runs alternate, and the figures are medians of ratios, since
machines are noisy. On a CPU it is torch's thread count that decides: give the one that is served with. The last line is one
JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F

from vlserve.kernels.head import int8_matmul
from vlserve.kernels.head.reference import int8_matmul_ref, quantise_rows
from vlserve.kernels.int4 import awq_dequantize, awq_matmul
from vlserve.kernels.int4.cpu import pack_for_cpu
from vlserve.kernels.int4.reference import awq_matmul_ref
from vlserve.kernels.int4_pairs import pack_for_gpu
from vlserve.kernels.with_triton import runs_triton

LAYERS = {"qkv_proj": (1152, 896), "o_proj": (896, 896), "gate_up_proj": (9728, 896), "down_proj": (896, 4864)}
HEAD = (151_674, 896)
GROUP = 128
ROWS = (1, 4, 8, 64)
Matmul = Callable[[torch.Tensor], torch.Tensor]


def four_bits(outputs: int, inputs: int, device: torch.device) -> tuple[Matmul, Matmul, Matmul]:
    """The product with 4-bit weights, with the same weights in bfloat16, and as it is defined."""
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = (torch.rand(outputs, inputs // GROUP, device=device) / 100 + 0.001).bfloat16()
    zeros = torch.randint(4, 12, scales.shape, dtype=torch.uint8, device=device)
    dense = awq_dequantize(codes, scales, zeros)
    pack = pack_for_cpu if device.type == "cpu" else pack_for_gpu if runs_triton(codes) else None
    packed = None if pack is None else pack(codes, scales, zeros)
    return (
        lambda x: awq_matmul(x, codes, scales, zeros) if packed is None else packed.matmul(x),
        lambda x: F.linear(x, dense),
        lambda x: awq_matmul_ref(x, codes, scales, zeros),
    )


def eight_bits(outputs: int, inputs: int, device: torch.device) -> tuple[Matmul, Matmul, Matmul]:
    """As `four_bits`, of the head."""
    dense = (torch.randn(outputs, inputs, device=device) / inputs**0.5).bfloat16()
    codes, scales = quantise_rows(dense)
    return (
        lambda x: int8_matmul(x, codes, scales),
        lambda x: F.linear(x, dense),
        lambda x: int8_matmul_ref(x, codes, scales),
    )


def seconds(work: Matmul, x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(copies: list[tuple[Matmul, Matmul, Matmul]], x: torch.Tensor, runs: int) -> dict[str, Any]:
    """Medians of `runs` of the quantised and the dense product, one after the other, each time with the next copy's weights."""
    quantised, _, defined = copies[0]
    want = defined(x.double())
    error = float((quantised(x).double() - want).norm() / want.norm())
    assert error < 8e-3, f"the product is off by {error:.1e}: no figures"
    times: tuple[list[float], list[float]] = ([], [])
    for run, forms in zip(range(-len(copies), runs), cycle(copies)):
        for taken, work in zip(times, forms, strict=False):
            took = seconds(work, x)
            if run >= 0:  # those before warm up
                taken.append(took)
    ratio = statistics.median(dense / ours for ours, dense in zip(*times, strict=True))
    ours, dense = (1e6 * statistics.median(taken) for taken in times)
    return {"rows": len(x), "microseconds": round(ours, 1), "dense": round(dense, 1), "times_as_fast": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--copies", type=int, default=8, help="of each layer's weights; the head, which is large, has one")
    parser.add_argument("--threads", type=int, help="torch's; default: all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, results = torch.device(args.device), []
    print(f"{'layer':14}{'outputs x inputs':>18}{'rows':>6}{'quantised us':>14}{'dense us':>11}   times as fast")
    for name, size in {**LAYERS, "lm_head": HEAD}.items():
        make = eight_bits if name == "lm_head" else four_bits
        copies = [make(*size, device) for _ in range(1 if name == "lm_head" else args.copies)]
        for rows in args.rows:
            row = measure(copies, torch.randn(rows, size[1], device=device).bfloat16(), args.runs)
            results.append({"layer": name, **row})
            shape = f"{size[0]} x {size[1]}"
            print(f"{name:14}{shape:>18}{rows:6}{row['microseconds']:14.1f}{row['dense']:11.1f}   {row['times_as_fast']:.2f}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({"machine": f"{where}, torch with {torch.get_num_threads()} threads", "group": GROUP, "results": results}))


if __name__ == "__main__":
    main()
