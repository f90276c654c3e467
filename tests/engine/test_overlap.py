"""Steps that are started before the one in front of them has been read give what steps one after another give."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.engine.ranks import tp_engine
from tests.engine.reference import Ties, add, engine, prompt, run, tokens
from tests.vision.test_preprocess import noise
from vlserve.config import SamplingParams, StructuredOutput
from vlserve.engine.engine import Engine
from vlserve.engine.messages import TokenEvent
from vlserve.engine.runner import Started
from vlserve.engine.scheduler import Chunk, Sampled
from vlserve.prompt.build import Prompt

LOGPROBS = SamplingParams(logprobs=2)
NUMBER = StructuredOutput(regex="[0-9]{3}[a-z]{2,9}")
ASKED = [
    LOGPROBS,
    SamplingParams(logprobs=2, temperature=0.9, top_p=0.9, seed=1),
    SamplingParams(logprobs=2, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(logprobs=2, structured=NUMBER),
    SamplingParams(logprobs=2, min_tokens=6, logit_bias={7: 2.0}, temperature=1.2, seed=2),
    SamplingParams(logprobs=2, ignore_eos=True),
    SamplingParams(logprobs=2, structured=NUMBER, temperature=1.5, seed=3),
    SamplingParams(logprobs=2, temperature=1.5, seed=4, stop_token_ids=tuple(range(0, 400, 5))),
]
SMALL = 50 * 4 * 2 * 3 * 2 * 8 * 4 / 2**30  # 50 blocks of 4 tokens


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen2")


def overlapping(engine: Engine) -> Engine:
    engine.overlaps = True
    return engine


def prompts(folder: Path) -> list[Prompt]:
    def pictures(i: int) -> list[Image.Image]:
        return [Image.fromarray(noise(20 + 9 * i, 40, seed=i))] * (i % 3)

    return [prompt(folder, f"Question {i} " + "word " * (i * 5 % 23), pictures(i)) for i in range(2 * len(ASKED))]


def answers(engine: Engine, prompts: list[Prompt]) -> dict[int, list[TokenEvent]]:
    """Half of them are asked when the others are under way."""
    asked = [(i, p, ASKED[i % len(ASKED)], 6 + i) for i, p in enumerate(prompts)]
    early: list[TokenEvent] = []
    for each in asked[::2]:
        add(engine, *each)
    for _ in range(4):
        early += engine.step()
    for each in asked[1::2]:
        add(engine, *each)
    events = run_on(engine, early)
    assert not engine.has_work
    return events


def run_on(engine: Engine, early: list[TokenEvent]) -> dict[int, list[TokenEvent]]:
    events: dict[int, list[TokenEvent]] = {}
    while engine.has_work:
        early += engine.step()
    for event in early:
        events.setdefault(event.id, []).append(event)
    pool = engine.scheduler.pool
    pool.check()
    assert pool.num_free == pool.num_blocks
    return events


def same(got: dict[int, list[TokenEvent]], want: dict[int, list[TokenEvent]]) -> None:
    ties = Ties()
    assert got.keys() == want.keys()
    for id in want:
        ties.same(got[id], want[id])
        assert [e.finish_reason for e in got[id]] == [e.finish_reason for e in want[id]]
    ties.check()


OPTIONS = {
    "plain": {},
    "chunks": {"max_num_batched_tokens": 37, "block_size": 4},
    "few at once": {"max_num_seqs": 3},
    "preempted": {"block_size": 4, "max_model_len": 200, "kv_cache_gib": SMALL, "prefix_caching": False},
    "preempted, kept prefixes": {"block_size": 4, "max_model_len": 200, "kv_cache_gib": SMALL, "max_num_batched_tokens": 64},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_request_equals_steps_one_after_another(folder: Path, name: str) -> None:
    asked = prompts(folder)
    ours = overlapping(engine(folder, **OPTIONS[name]))
    got = answers(ours, asked)
    assert ("preempted" in name) == (ours.scheduler.num_preemptions > 0)
    same(got, answers(engine(folder, **OPTIONS[name]), asked))
    assert {events[-1].finish_reason for events in got.values()} == {"stop", "length"}
    assert not ours.runner._last_rows


def test_two_ranks_equal_steps_one_after_another(folder: Path) -> None:
    asked = prompts(folder)
    with tp_engine(folder, 2, max_num_batched_tokens=37) as (ours, _):
        got = answers(overlapping(ours), asked)
    same(got, answers(engine(folder, max_num_batched_tokens=37), asked))


def test_a_step_is_started_before_the_one_in_front_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = overlapping(engine(folder))
    runner, order = ours.runner, list[str]()
    started: list[Started] = []
    start, finish = runner.start, runner.finish

    def note_start(chunks: list[Chunk]) -> Started:
        order.append(f"start {len(started)}")
        started.append(start(chunks))
        return started[-1]

    def note_finish(step: Started) -> list[Sampled]:
        order.append(f"read {started.index(step)}")
        return finish(step)

    monkeypatch.setattr(runner, "start", note_start)
    monkeypatch.setattr(runner, "finish", note_finish)
    add(ours, 0, prompt(folder, "What is it?"), SamplingParams(ignore_eos=True), 4)
    run(ours)
    assert order == ["start 0", "start 1", "read 0", "start 2", "read 1", "start 3", "read 2", "read 3"]


def test_nothing_is_computed_past_the_last_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is known beforehand; what follows an end token is computed in vain, once."""
    ours = overlapping(engine(folder, max_model_len=64))
    rows: list[int] = []
    start = ours.runner.start

    def count(chunks: list[Chunk]) -> Started:
        rows.extend(place for chunk in chunks for place in range(chunk.start, chunk.stop))
        return start(chunks)

    monkeypatch.setattr(ours.runner, "start", count)
    p = prompt(folder, "What is it?")
    add(ours, 0, p, SamplingParams(ignore_eos=True), 9)
    add(ours, 1, p, SamplingParams(ignore_eos=True), 1000)
    got = run(ours)
    assert len(got[0]) == 9 and len(p.token_ids) + len(got[1]) == 64
    assert len(rows) == 2 * len(p.token_ids) + 8 + len(got[1]) - 1 and max(rows) == 62
    rows.clear()
    add(ours, 2, p, SamplingParams(stop_token_ids=tuple(t for t in tokens(got[0])[2:3])), 9)
    number = len(run(ours)[2])
    assert max(rows) == len(p.token_ids) + number - 1


def test_aborted_under_way_and_asked_again_under_the_same_id(folder: Path) -> None:
    ours = overlapping(engine(folder))
    asked = prompts(folder)
    add(ours, 0, asked[0], SamplingParams(ignore_eos=True), 20)
    add(ours, 1, asked[1], LOGPROBS, 12)
    events = [event for _ in range(3) for event in ours.step()]
    (aborted,) = ours.abort([0])
    assert aborted.finish_reason == "abort"
    add(ours, 0, asked[2], LOGPROBS, 12)
    kept = [e for e in events if e.id == 1]
    got = run_on(ours, kept)
    plain = engine(folder)
    for id, p in ((0, asked[2]), (1, asked[1])):
        add(plain, id, p, LOGPROBS, 12)
    same(got, run(plain))


@pytest.mark.parametrize("overlaps", (False, True))
def test_what_was_booked_before_a_grammar_failed_is_told(folder: Path, overlaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine(folder)
    ours.overlaps = overlaps
    add(ours, 0, prompt(folder, "a"), SamplingParams(ignore_eos=True), 1)
    add(ours, 1, prompt(folder, "b"), SamplingParams(structured=NUMBER), 9)
    grammar = ours.scheduler.waiting[1].grammar
    assert grammar is not None
    while not grammar.is_ready:
        time.sleep(0.01)

    def broken(self: Any, token_id: int) -> bool:
        raise ValueError("a token that is none")

    monkeypatch.setattr(type(grammar), "accept", broken)
    events = run(ours)
    assert [e.finish_reason for e in events[0]] == ["length"] and [e.finish_reason for e in events[1]] == ["error"]


@pytest.mark.parametrize("where", ("start", "sample", "finish"))
def test_a_step_that_breaks_ends_its_requests_and_not_the_engine(
    folder: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = overlapping(engine(folder))
    asked = prompts(folder)
    add(ours, 0, asked[0], SamplingParams(ignore_eos=True), 20)
    for _ in range(3):
        ours.step()
    whole, calls = getattr(ours.runner, where), list[Any]()

    def broken(given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return whole(given)

    monkeypatch.setattr(ours.runner, where, broken)
    add(ours, 1, asked[1], LOGPROBS, 12)
    events = run_on(ours, [])
    assert events[0][-1].finish_reason == "error" and "RuntimeError" in str(events[0][-1].error)
    add(ours, 2, asked[1], LOGPROBS, 12)
    plain = engine(folder)
    add(plain, 2, asked[1], LOGPROBS, 12)
    same(run(ours), run(plain))
