"""The scheduler on its own, with a fake model: every request ends once, budgets hold, nobody starves."""

from __future__ import annotations

import random

import pytest

from vlserve.config import SamplingParams
from vlserve.engine.messages import TokenEvent
from vlserve.engine.scheduler import Chunk, Sampled, Scheduler
from vlserve.engine.sequence import MediaSpan, Sequence
from vlserve.llm.block_pool import BlockPool

END = 7


def scheduler(num_blocks: int = 64, *, seqs: int = 4, budget: int = 16, max_len: int = 100, size: int = 4) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, size),
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_len,
        end_token_ids=frozenset([END]),
    )


def sequence(id: int, length: int, max_tokens: int = 5, **sampling: object) -> Sequence:
    ids = [100 + (id * 31 + i) % 50 for i in range(length)]
    return Sequence(id=id, token_ids=ids, media=[], sampling=SamplingParams(**sampling), max_tokens=max_tokens)  # type: ignore[arg-type]


def step(s: Scheduler, token: int = 1) -> tuple[list[Chunk], list[TokenEvent]]:
    chunks = s.schedule()
    s.expect(chunks)
    return chunks, s.commit(chunks, [Sampled(token_id=token) for c in chunks if c.samples])


def test_a_long_prompt_is_cut_into_chunks_and_samples_once() -> None:
    s = scheduler(budget=10)
    s.add(sequence(0, 25, max_tokens=1))
    sizes = []
    events: list[TokenEvent] = []
    while s.has_work:
        chunks, news = step(s)
        sizes += [c.stop - c.start for c in chunks]
        events += news
    assert sizes == [10, 10, 5] and [e.finish_reason for e in events] == ["length"]


def test_decodes_come_before_prefills() -> None:
    s = scheduler(budget=8)
    s.add(sequence(0, 3, max_tokens=20))
    step(s)
    s.add(sequence(1, 30))
    for _ in range(3):
        chunks, _ = step(s)
        assert chunks[0].sequence.id == 0 and chunks[0].stop - chunks[0].start == 1
        assert sum(c.stop - c.start for c in chunks) <= 8


@pytest.mark.parametrize(
    "sampling,token,reason",
    [
        ({}, END, "stop"),
        ({"stop_token_ids": (9,)}, 9, "stop"),
        ({"ignore_eos": True}, END, "length"),
        ({"min_tokens": 3}, END, "stop"),
    ],
)
def test_reasons(sampling: dict[str, object], token: int, reason: str) -> None:
    s = scheduler()
    s.add(sequence(0, 3, max_tokens=4, **sampling))
    events: list[TokenEvent] = []
    while s.has_work:
        events += step(s, token)[1]
    assert events[-1].finish_reason == reason
    assert len(events) == {"stop": sampling.get("min_tokens", 1), "length": 4}[reason]


def test_the_context_limit_ends_an_answer() -> None:
    s = scheduler(max_len=10)
    s.add(sequence(0, 8, max_tokens=50))
    events: list[TokenEvent] = []
    while s.has_work:
        events += step(s)[1]
    assert len(events) == 2 and events[-1].finish_reason == "length"


def test_the_last_prompt_token_is_always_computed() -> None:
    s = scheduler(size=4)
    for id in (0, 0):
        s.add(sequence(id, 8, max_tokens=1))
        chunks, _ = step(s)
    assert chunks[0].start == 4, "two full blocks are known, the second holds the last token"


@pytest.mark.parametrize("overlaps", (False, True))
@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_exactly_once_whatever_happens(seed: int, overlaps: bool) -> None:
    rng = random.Random(seed)

    def commit(chunks: list[Chunk]) -> list[TokenEvent]:
        return s.commit(chunks, [Sampled(token_id=rng.choice([1, 2, END])) for c in chunks if c.samples])

    s = scheduler(num_blocks=26, seqs=rng.randint(1, 6), budget=rng.randint(1, 40), max_len=100, size=4)
    ended: dict[int, int] = {}
    added = 0
    started: list[Chunk] = []
    while added < 25 or s.has_work:
        if added < 25 and rng.random() < 0.5:
            q = sequence(added, rng.randint(1, 60), rng.randint(1, 30))
            if rng.random() < 0.4:
                q.media.append(
                    MediaSpan(digest=bytes([rng.randint(0, 3)]) * 32, units=[], runs=[(0, 1)], layout_start=0, pixels=None)
                )
            s.add(q)
            added += 1
        events: list[TokenEvent] = []
        if rng.random() < 0.1:
            events += s.abort([rng.randrange(25)])
        chunks = s.schedule()
        assert sum(c.stop - c.start for c in chunks) <= s.max_num_batched_tokens
        assert len({c.sequence.id for c in chunks}) == len(chunks) <= s.max_num_seqs
        for c in chunks:
            assert c.start == c.sequence.num_computed < c.stop <= len(c.sequence.token_ids)
            assert len(c.sequence.blocks) * 4 >= c.stop
            assert s.max_model_len > c.stop and c.stop - c.sequence.num_prompt_tokens < c.sequence.max_tokens
        if overlaps:
            events += commit(started)
        if rng.random() < 0.05:
            events += s.fail(chunks, "broken")
            chunks = []
        s.expect(chunks)
        started = chunks
        if not overlaps:
            events += commit(started)
        for e in events:
            if e.finish_reason:
                ended[e.id] = ended.get(e.id, 0) + 1
        s.pool.check()
    assert ended == dict.fromkeys(range(25), 1)
    assert s.pool.num_free == 26


def seen_before(s: Scheduler, id: int, features: int, length: int) -> Sequence:
    """All of its full blocks are in the prefix cache; its picture of `features` ends the prompt."""
    one = sequence(id, length)
    runs = [(length - features, features)]
    one.media = [MediaSpan(digest=bytes([id]) * 32, units=[], runs=runs, layout_start=length - features, pixels=None)]
    blocks = s.pool.allocate((length - 1) // s.pool.block_size)
    for block, digest in zip(blocks, one.digest_blocks(len(blocks), s.pool.block_size), strict=True):
        s.pool.register(block, digest)
    s.pool.release(blocks)
    return one


def test_a_step_has_no_more_pictures_than_memory_is_set_aside_for() -> None:
    """Few tokens may ask for many pictures, where the prefix cache has the rest."""
    s = scheduler(100, seqs=8, budget=16, max_len=40)
    assert s.most_features == 56
    for id in range(8):
        s.add(seen_before(s, id, 25, 30))
    features, ended = [], 0
    while s.has_work:
        chunks, events = step(s)
        features.append(sum(media.num_features for chunk in chunks for media in chunk.media))
        ended += sum(event.finish_reason is not None for event in events)
    assert ended == 8 and max(features) == 50 and sum(features) == 8 * 25
    s.pool.check()


def test_a_picture_as_large_as_a_prompt_may_be_is_computed() -> None:
    s = scheduler(seqs=2, budget=16, max_len=40)
    one, other = (seen_before(s, id, 38, 39) for id in range(2))
    s.add(one)
    s.add(other)
    ended = 0
    while s.has_work:
        ended += sum(event.finish_reason is not None for event in step(s)[1])
    assert ended == 2
