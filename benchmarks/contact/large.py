"""A checkpoint in the sizes of InternVL3-1B, made on the spot: its answers in bfloat16, and its memory against the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.contact.asking import answer, compare, kept_answers, make_engine, make_prompts
from benchmarks.contact.engines import make_tiny
from benchmarks.contact.isolated import CheckError
from benchmarks.contact.setting import Setting
from benchmarks.internvl3_1b import make_checkpoint
from vlserve.engine.runner import Runner
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.settled_config import read_stored
from vlserve.plan.tp_plan import make_plan

FLOAT32 = {"tie": 1e-3, "within": 5e-3}
# random weights: the likeliest tokens lie near each other, and every layer rounds to 8 bits
BFLOAT16 = {"tie": 0.1, "within": 0.1}
LOGPROBS = 20
NEAR = 0.02  # of planned bytes of weights and of the KV cache


def large(setting: Setting) -> Path:
    if setting.is_rehearsed:
        return make_tiny(setting.kept / "tiny", seed=0)
    folder = setting.kept / "1b"
    if not (folder / "model.safetensors").exists():
        make_checkpoint(folder.with_name("1b.new"), salient=1.0).replace(
            folder
        )  # channels that stand out magnify what is rounded
    return folder


def one_billion(setting: Setting) -> None:
    """In float32 and in bfloat16, against the CPU in float32 with the same weights."""
    folder, scale = large(setting), setting.scale
    prompts = make_prompts(folder, scale.large_items)
    room = {"max_model_len": 128} if setting.is_rehearsed else {"max_model_len": 2048, "kv_cache_gib": 0.5}
    want = kept_answers(setting, folder, prompts, scale.large_tokens, logprobs=LOGPROBS, dtype="float32", **room)
    with setting.device():
        for dtype, tolerance in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
            engine = make_engine(folder, "cuda", dtype=dtype, **_options(setting) | room)
            got = answer(engine, prompts, scale.large_tokens, LOGPROBS)
            compare(setting, dtype, got, want, **tolerance)
            del engine


def _options(setting: Setting) -> dict[str, Any]:
    return {"max_num_seqs": 2, "max_model_len": 128, "max_num_batched_tokens": 32} if setting.is_rehearsed else {}


def memory(setting: Setting) -> None:
    """What is planned, what is held, and what a run takes at its peak."""
    folder, options = large(setting), _options(setting)
    prompts = make_prompts(folder, setting.scale.large_items)
    checkpoint = read_checkpoint(folder)
    plan = make_plan(checkpoint.config, tp=1, source=str(folder), stored=read_stored(folder), **options).ranks[0]
    measured: list[int] = []
    measure = Runner._measure_peak

    def noted(runner: Runner, num_tokens: int, max_num_seqs: int) -> int:
        measured.append(measure(runner, num_tokens, max_num_seqs))
        return measured[-1]

    Runner._measure_peak = noted  # type: ignore[method-assign]
    with setting.device():
        before = torch.cuda.mem_get_info()[0]
        engine = make_engine(folder, "cuda", kv_cache_gib=0.01 if setting.is_rehearsed else None, **options)
        runner = engine.runner
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        answer(engine, prompts, setting.scale.large_tokens)
        peak = torch.cuda.max_memory_allocated() - held
        by_kind = runner.device_bytes()
        row = {
            "weights": {"planned": plan.vision_bytes + plan.decoder_bytes + plan.embedding_bytes, "held": _weights(by_kind)},
            "kv_cache": {
                "planned": (runner.num_blocks + 1) * runner.block_size * plan.kv_bytes_per_token,
                "held": by_kind["kv_cache"],
            },
            "activations": {"planned": plan.activation_bytes, "measured_at_start": measured[0], "peak_of_a_run": peak},
            "graphs": {"planned": plan.graph_bytes, "left": _left(runner)},
            "vision_cache": by_kind["vision_cache"],
            "other": by_kind["other"],
            "taken_from_the_device": before - torch.cuda.mem_get_info()[0],
        }
        setting.found(**row)
        _judge(row)


def _weights(by_kind: dict[str, int]) -> int:
    return by_kind["vision"] + by_kind["decoder"] + by_kind["embedding"]


def _left(runner: Runner) -> int | None:
    recorder: Any = None if runner.decodes is None else runner.decodes.graphs._recorder
    return None if recorder is None else recorder.num_free_bytes


def _judge(row: dict[str, Any]) -> None:
    wrong = []
    for name in ("weights", "kv_cache"):
        planned, held = row[name]["planned"], row[name]["held"]
        if abs(held - planned) > NEAR * planned:
            wrong.append(f"{name}: {held} bytes are held, {planned} planned")
    activations = row["activations"]
    allowed = activations["measured_at_start"] + row["graphs"]["planned"] + row["vision_cache"]
    if activations["peak_of_a_run"] > allowed:
        wrong.append(f"a run took {activations['peak_of_a_run']} bytes, {allowed} were set aside: {json.dumps(activations)}")
    if row["graphs"]["left"] is not None and row["graphs"]["left"] < 0:
        wrong.append(f"graphs took {-row['graphs']['left']} bytes more than was set aside")
    if row["other"] > activations["planned"] + row["graphs"]["planned"]:  # the rotary table, and what graphs hold
        wrong.append(f"{row['other']} bytes are held that are neither weights nor caches")
    if wrong:
        raise CheckError("; ".join(wrong))
