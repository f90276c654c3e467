"""Every kernel against its definition in float64: each case in a process of its own, several at once, nothing timed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.contact.isolated import PASSED, CheckError, Job, run_jobs
from benchmarks.contact.setting import Setting
from benchmarks.gpu.attention import attention
from benchmarks.gpu.case import Case
from benchmarks.gpu.elementwise import gate, gate_with_sums, norm, norm_with_sums, rotary
from benchmarks.gpu.experts import GPT_OSS_20B, QWEN3_30B, TINY_MIXTURE, expert_product
from benchmarks.gpu.heads import head, int8_head
from benchmarks.gpu.products import product, spread_out
from benchmarks.gpu.sampling import drawing, greedy
from benchmarks.gpu.sizes import KINDS, MODELS, TINY, Sizes
from benchmarks.gpu.vision import encoder_norm

CASE_LIMIT_S = 25
ATTENTION = ((1, 1, 4096), (64, 1, 1024), (1, 512, 1024))  # sequences, tokens of each, context


def kernels(setting: Setting) -> None:
    """Raises CheckError when one failed, once all have been tried."""
    cases = list(tiny_cases() if setting.is_rehearsed else real_cases())
    jobs = {case.name: Job(name=case.name, work=partial(_check, case, setting), limit_s=CASE_LIMIT_S) for case in cases}
    failed = []
    at_once = min(setting.scale.at_once, os.cpu_count() or 1)
    for job, outcome in run_jobs(jobs.values(), setting.log, at_once=at_once, is_nested=True):
        if outcome.status != PASSED:
            failed.append(job.name)
            setting.found(case=job.name, status=outcome.status, seconds=round(outcome.seconds, 1), reason=outcome.reason)
    if failed:
        raise CheckError(f"{len(failed)} of {len(jobs)} cases failed: {'; '.join(failed)}")


def _check(case: Case, setting: Setting) -> None:
    with setting.device(), torch.inference_mode():
        torch.manual_seed(0)
        found = case.build(torch.device("cuda", 0)).difference()
        if not found.within(case.tolerance):
            raise CheckError(f"{found} from the definition; tolerated are {case.tolerance}")
        setting.found(case=case.name, status=PASSED, relative=found.relative, largest=found.largest)


def real_cases() -> Iterator[Case]:
    """In the sizes of models, so that they are launched as in use; those that a decode step takes come first."""
    one, eight, large = MODELS["1b"], MODELS["8b"], MODELS["38b"]
    for rows in (1, 16, 32, 64, 128, 1024):
        yield _product(eight, "qkv_proj", rows)
    for sizes in (one, eight):
        for batch, query_len, context in ATTENTION:
            for kind in KINDS:
                yield attention(sizes, batch, query_len, context, kind)
    for rows in (1, 64):
        yield norm(eight, rows, adds=False)
        yield norm(eight, rows, adds=True)
        yield norm_with_sums(eight, rows)
        yield gate(eight, rows)
        yield gate_with_sums(eight, rows)
        yield drawing("8b", eight.vocab, rows)
    yield greedy("8b", eight.vocab, 64)
    for kind in KINDS:
        yield from (rotary(sizes, 64, kind) for sizes in (one, eight))
    yield from (head("8b", eight.vocab, eight.hidden, rows) for rows in (1, 16))
    yield from (int8_head("8b", eight.vocab, eight.hidden, rows) for rows in (1, 16, 64))
    yield from (encoder_norm(sizes, 1) for sizes in (eight, large))
    yield from (_product(eight, "o_proj", 16), _product(one, "qkv_proj", 1), _product(one, "down_proj", 64))
    yield from (_product(eight, "qkv_proj", rows, torch.float16) for rows in (16, 64))
    yield from (expert_product(QWEN3_30B, form, 16) for form in QWEN3_30B.forms)
    yield from (expert_product(GPT_OSS_20B, "mxfp4", tokens) for tokens in (1, 1024))
    outputs, inputs = eight.linears["qkv_proj"]
    yield spread_out("8b", f"qkv_proj {outputs} x {inputs}", outputs, inputs)


def _product(sizes: Sizes, name: str, rows: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    outputs, inputs = sizes.linears[name]
    return product(sizes.name, f"{name} {outputs} x {inputs}", outputs, inputs, rows, dtype)


def tiny_cases() -> Iterator[Case]:
    """One of each kind, for the interpreter."""
    yield from (product("tiny", "64 x 256", 64, 256, 3), head("tiny", 300, 64, 3), int8_head("tiny", 300, 64, 3))
    yield from (expert_product(TINY_MIXTURE, form, 3) for form in TINY_MIXTURE.forms)
    yield from (norm(TINY, 3, adds=True), gate(TINY, 3), greedy("tiny", 300, 2), drawing("tiny", 300, 2))
    yield from (attention(TINY, 2, 1, 20, "int8"), rotary(TINY, 3, "fp8"), encoder_norm(TINY, 1))
