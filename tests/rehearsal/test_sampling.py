"""Every sampling parameter on a card that is not there: the tokens are the CPU's, in one batch of all kinds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.engine.reference import engine, prompt, tokens
from tests.rehearsal.engines import Answers, Asked, Rig, same, serve
from vlserve.config import SamplingParams, StructuredOutput
from vlserve.engine.engine import Engine

OPTIONS: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 16, "max_model_len": 32}
WORD = StructuredOutput(regex="[0-9]{2}[a-z]{2,9}")
PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.2, "seed": 2, "top_k": 5},
    {"temperature": 1.2, "seed": 3, "top_p": 0.7},
    {"temperature": 2.0, "seed": 4, "min_p": 0.05},
    {"temperature": 1.5, "seed": -5, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.5, "seed": 6, "top_p": 0},  # the likeliest
    {"temperature": 1.5, "top_k": 1},  # without a seed of its own
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"logit_bias": {7: 100.0, 9: -100.0}},
    {"min_tokens": 3, "stop_token_ids": list(range(0, 320, 2))},
    {"ignore_eos": True, "logit_bias": {"end": 100.0}},
    {"min_tokens": 2, "logit_bias": {"end": 100.0}},
    {"logprobs": 0},
    {"logprobs": 20, "temperature": 1.0, "seed": 8},
    {"structured": WORD},
    {"structured": StructuredOutput(choice=["yes", "no"])},
    {"structured": StructuredOutput(json={"type": "integer"}), "temperature": 1.5, "seed": 9, "min_tokens": 2},
    {"structured": WORD, "repetition_penalty": 1.3, "logit_bias": {20: 3.0}, "temperature": 0.7, "seed": 10, "top_k": 9},
]
BESIDE = {"stop", "skip_special_tokens", "include_stop_str_in_output", "max_tokens"}  # the front's, and a request's own


@pytest.fixture(scope="module")
def ours(rig: Rig, tiny: Path) -> Engine:
    return rig.engine(tiny, **OPTIONS)


@pytest.fixture(scope="module")
def asked(tiny: Path, ours: Engine) -> list[Asked]:
    (end, *_) = ours.runner.end_token_ids
    made = []
    for i, given in enumerate(PARAMETERS):
        bias = {end if id == "end" else id: value for id, value in given.get("logit_bias", {}).items()}
        sampling = SamplingParams(**{"logprobs": 2, **given, "logit_bias": bias})
        is_slow = sampling.top_k > 1 or 0 < sampling.top_p < 1  # in the interpreter
        made.append((prompt(tiny, "Why?"[: 1 + i % 4]), sampling, 2 if is_slow else 4))
    return made


@pytest.fixture(scope="module")
def got(rig: Rig, ours: Engine, asked: list[Asked]) -> Answers:
    """The grammars are compiled before, so that what is waited for is the device alone."""
    for _, sampling, _ in asked:
        if sampling.structured is not None:
            ours.grammars.compile(sampling.structured)
    return rig.serve(ours, asked)


def test_every_parameter_is_asked_for() -> None:
    assert {name for given in PARAMETERS for name in given} == {f.name for f in fields(SamplingParams)} - BESIDE


def test_the_tokens_are_the_cpus(got: Answers, tiny: Path, asked: list[Asked]) -> None:
    same(got, serve(engine(tiny, device="cpu", **OPTIONS), asked))


def test_what_was_asked_was_done(got: Answers) -> None:
    """So that the two do not agree on nothing."""
    kinds = {name: i for i, given in enumerate(PARAMETERS) for name in given}
    assert tokens(got[PARAMETERS.index({"logit_bias": {7: 100.0, 9: -100.0}})]) == [7] * 4
    assert got[kinds["ignore_eos"]][-1].finish_reason == "length" and len(set(tokens(got[kinds["ignore_eos"]]))) == 1
    assert len(got[11]) >= 3 and len(got[13]) == 3 and got[13][-1].finish_reason == "stop"
    assert all(len(event.logprob.top) == 20 for event in got[15] if event.logprob is not None)
    assert [event.finish_reason for event in got[17]][-1] in ("stop", "length")
    assert len({tuple(tokens(events)) for events in got.values()}) > 10


def test_a_row_alone_compiles_nothing_new(rig: Rig, ours: Engine, asked: list[Asked], got: Answers) -> None:
    """One draw, one row that is cut, one penalty: as many as a kernel might be compiled anew for."""
    for i in (1, 3, 9, 16):
        assert tokens(rig.serve(ours, [asked[i]])[0]) == tokens(got[i])
