"""Quantises a model of InternVL3-1B's sizes by each method: error by layer, time and memory, and what a kill costs.

The weights are random, with salient channels; see internvl3_1b.py. AWQ is run a second time, killed half-way and resumed, and
must write the same files. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from internvl3_1b import TEXT, make_checkpoint

LAYERS = int(TEXT["num_hidden_layers"])


def run(model: Path, out: Path, options: list[str], *, kill_after: int | None = None) -> dict[str, Any]:
    """One `vlserve quantize`, perhaps killed when so many layers are written; seconds and the peak of resident memory in MB."""
    command = [sys.executable, "-m", "vlserve", "quantize", str(model), str(out), *options]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    if kill_after is not None:
        while len(list((out / ".quantize-work").glob("layer-*.safetensors"))) < kill_after:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == (0 if kill_after is None else -signal.SIGKILL), f"status {process.returncode}"
    return {"seconds": round(time.perf_counter() - begun, 1), "peak_mb": round(usage.ru_maxrss * 1024 / 1e6)}


def hashes(folder: Path) -> dict[str, str]:
    """Of every file."""
    return {path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def show(reports: dict[str, Any]) -> None:
    linears = list(next(iter(reports.values()))["layers"][0]["linear_errors"])
    print("\nmeans over the layers: error of each linear layer on the calibration samples; of a layer, and drift, held out")
    print(f"{'method':8}" + "".join(f"{name.split('.')[-1]:>11}" for name in linears) + f"{'layer':>9}{'drift':>9}")
    for method, report in reports.items():
        cells = [mean(layer["linear_errors"][name] for layer in report["layers"]) for name in linears]
        layers = [mean(layer[key] for layer in report["layers"]) for key in ("error", "drift")]
        print(f"{method:8}" + "".join(f"{cell:11.2%}" for cell in cells) + "".join(f"{cell:9.2%}" for cell in layers))
    if {"awq", "rtn"} <= set(reports):
        pairs = list(zip(reports["awq"]["layers"], reports["rtn"]["layers"], strict=True))
        better = sum(a["linear_errors"][name] < b["linear_errors"][name] for a, b in pairs for name in linears)
        print(f"awq is better than rtn in {better} of {len(pairs) * len(linears)} linear layers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["rtn", "awq"], choices=("rtn", "awq", "gptq", "fp8"))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where the models are made and stay; default: a temporary folder")
    parser.add_argument("--no-kill", action="store_true", help="leave out the run that is killed and resumed")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = args.folder or Path(temporary)
        model = folder / "bf16"
        if not (model / "model.safetensors").exists():
            make_checkpoint(model)
        size = (model / "model.safetensors").stat().st_size
        print(f"the model: {size / 1e6:.0f} MB, {LAYERS} decoder layers; {args.samples} samples")
        reports, costs = {}, {}
        for method in args.methods:
            options = ["--method", method, "--samples", str(args.samples)]
            options += [] if method == "fp8" else ["--group-size", str(args.group_size)]
            costs[method] = run(model, folder / method, options)
            reports[method] = json.loads((folder / method / "report.json").read_text())
            print(f"{method}: {costs[method]['seconds']} s, at most {costs[method]['peak_mb']} MB resident", flush=True)
        show(reports)
        result: dict[str, Any] = {"model_bytes": size, "samples": args.samples, "costs": costs}
        if "awq" in args.methods and not args.no_kill:
            options = ["--method", "awq", "--samples", str(args.samples), "--group-size", str(args.group_size)]
            killed = run(model, folder / "again", options, kill_after=LAYERS // 2)
            resumed = run(model, folder / "again", options)
            same = hashes(folder / "awq") == hashes(folder / "again")
            files = "the same files" if same else "OTHER FILES"
            print(f"killed after {killed['seconds']} s, resumed for {resumed['seconds']} s: {files}")
            result |= {"killed": killed, "resumed": resumed, "same_files": same}
        print(json.dumps(result))
        sys.exit(0 if result.get("same_files", True) else 1)


if __name__ == "__main__":
    main()
