"""What rank 0 tells the others is what it knows itself: random schedules through the real scheduler, step by step."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
import torch

from vlserve.config import SamplingParams
from vlserve.engine.batch import Announcement, Announcer, Batch, Listener, StepInput, describe, lay_out, make_batch
from vlserve.engine.messages import TokenEvent
from vlserve.engine.scheduler import Chunk, Sampled, Scheduler
from vlserve.engine.sequence import UNKNOWN, MediaSpan, Sequence, TokenPositions
from vlserve.llm.block_pool import BlockPool
from vlserve.vision.pixels import Unit

END, CPU = 7, torch.device("cpu")
AXES = 3  # of positions
POSITIONS = ("own positions", "answered after own positions")


class Ranks:
    """Rank 0 and one that listens, without a model: tokens are random, and the second hears messages and tokens only."""

    def __init__(self, scheduler: Scheduler, rng: random.Random, *, overlaps: bool = False) -> None:
        self.scheduler, self.rng, self.overlaps = scheduler, rng, overlaps
        self.open: tuple[list[Chunk], list[int]] = [], []
        self.announcer, self.listener = Announcer(), Listener()
        self.last_tokens, self.last_rows = torch.zeros(1, dtype=torch.int64), dict[int, int]()
        self.seen: Counter[str] = Counter()
        self.messages: list[bytes] = []

    def step(self) -> list[TokenEvent]:
        chunks = self.scheduler.schedule()
        if not chunks:
            return self.commit()
        features = {media.digest for chunk in chunks for media in chunk.media if self.rng.random() < 0.5}
        step = describe(chunks, features, self.last_rows)
        dropped = [bytes([self.rng.randrange(256)])] if self.rng.random() < 0.1 else []
        self.announcer.dropped(dropped)
        self.messages.append(self.announcer.step(step, chunks))
        told = self.listener.read(self.messages[-1])
        assert told.dropped == dropped and not told.is_last
        assert told.step is not None
        batch = self.compare(step, told.step, chunks)
        events = self.commit()
        known = [id for c in chunks for id in c.sequence.token_ids[c.start : c.stop]]
        assert all(want in (id, UNKNOWN) for id, want in zip(batch.ids.tolist(), known, strict=True))
        assert all(UNKNOWN not in c.sequence.token_ids or c.sequence.has_ended for c in chunks)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        tokens = [self.rng.choice([END, *range(100, 140)]) for _ in sampling]
        if sampling:
            self.last_rows = {sequence.id: row for row, sequence in enumerate(sampling) if not sequence.has_ended}
            self.last_tokens = torch.tensor(tokens)
        self.scheduler.expect(chunks)
        self.open = chunks, tokens
        return events if self.overlaps else events + self.commit()

    def commit(self) -> list[TokenEvent]:
        (chunks, tokens), self.open = self.open, ([], [])
        return self.ended(self.scheduler.commit(chunks, [Sampled(token_id=token) for token in tokens]))

    def compare(self, step: StepInput, told: StepInput, chunks: list[Chunk]) -> Batch:
        assert told.chunks == step.chunks, "whole block tables"
        assert (told.pieces, told.encode) == (step.pieces, step.encode)
        assert lay_out(told, 4, AXES).partial_blocks == lay_out(step, 4, AXES).partial_blocks
        batch = make_batch(lay_out(told, 4, AXES), 4, CPU, self.last_tokens)
        same_batch(batch, make_batch(lay_out(step, 4, AXES), 4, CPU, self.last_tokens))
        assert batch.positions.tolist() == [
            [own(c, i, axis) for c in chunks for i in range(c.start, c.stop)] for axis in range(AXES)
        ]
        self.seen["own positions"] += any(chunk.positions for chunk in told.chunks)
        self.seen["answered after own positions"] += any(chunk.offset and not chunk.positions for chunk in told.chunks)
        self.seen["sampled before"] += sum(id < 0 for id in told.ids)
        self.seen["steps"] += 1
        self.seen["without samples"] += not any(chunk.samples for chunk in chunks)
        self.seen["cut pictures"] += sum(piece.first > 0 for piece in step.pieces)
        return batch

    def abort(self, ids: list[int]) -> list[TokenEvent]:
        return self.ended(self.scheduler.abort(ids))

    def ended(self, events: list[TokenEvent]) -> list[TokenEvent]:
        ended = [event.id for event in events if event.finish_reason]
        self.announcer.ended(ended)
        for id in ended:
            self.last_rows.pop(id, None)
        return events


def own(chunk: Chunk, place: int, axis: int) -> int:
    """Where the token at `place` stands, by the sequence's own numbers; see `sequence`."""
    sequence = chunk.sequence
    if sequence.positions is None:
        return place
    number = sequence.num_prompt_tokens
    return 2 * place + axis if place < number else place - number + 7


def same_batch(got: Batch, want: Batch) -> None:
    for name in ("ids", "positions", "sample_rows", "feature_rows"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("block_tables", "slots"):
        assert torch.equal(getattr(got.metadata, name), getattr(want.metadata, name)), name
    assert (got.metadata.query_lens, got.metadata.context_lens) == (want.metadata.query_lens, want.metadata.context_lens)


def scheduler(num_blocks: int, *, prefix_caching: bool = True, seqs: int = 6, budget: int = 16, max_len: int = 80) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, 4, prefix_caching=prefix_caching),
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_len,
        end_token_ids=frozenset([END]),
    )


def sequence(rng: random.Random, id: int) -> Sequence:
    start, num_tokens = rng.randrange(8), rng.choice((0, 4, 12))
    ids = [50 + i % 3 for i in range(start)] + [0] * num_tokens + [rng.randrange(100, 104) for _ in range(rng.randint(1, 30))]
    units = [Unit((3, 2, 2), 4)] * (num_tokens // 4)
    runs = [(start, num_tokens)] if rng.random() < 0.5 else [(start + i, 2) for i in range(0, num_tokens, 4)]  # with gaps
    media = [MediaSpan(digest=bytes([rng.randrange(4)]), units=units, runs=runs, layout_start=start, pixels=None)]
    sampling = SamplingParams(ignore_eos=rng.random() < 0.7)
    axes = [[2 * place + axis for place in range(len(ids))] for axis in range(AXES)]
    return Sequence(
        id=id,
        token_ids=ids,
        media=media if num_tokens else [],
        sampling=sampling,
        max_tokens=rng.randint(1, 30),
        positions=TokenPositions(axes, next=7) if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize("overlaps", (False, True))
@pytest.mark.parametrize("seed", range(8))
def test_the_listener_knows_what_rank_0_knows(seed: int, overlaps: bool) -> None:
    rng = random.Random(seed)
    s = scheduler(rng.choice((20, 24, 200)), prefix_caching=rng.random() < 0.7, budget=rng.choice((3, 16, 64)))
    ranks = Ranks(s, rng, overlaps=overlaps)
    finished: list[int] = []
    next_id = 0
    while next_id < 25 or ranks.scheduler.has_work:
        if next_id < 25 and rng.random() < 0.4:
            # ids of requests that ended may come again
            again = finished.pop() if finished and rng.random() < 0.3 else None
            ranks.scheduler.add(sequence(rng, next_id if again is None else again))
            next_id += again is None
        if rng.random() < 0.1:
            known = [s.id for s in (*ranks.scheduler.running, *ranks.scheduler.waiting)]
            finished += [event.id for event in ranks.abort(rng.sample(known, min(len(known), 2)))]
        if ranks.scheduler.has_work:
            finished += [event.id for event in ranks.step() if event.finish_reason]
        elif rng.random() < 0.5:
            assert ranks.listener.read(ranks.announcer.idle()).step is None
    ranks.commit()
    last = ranks.listener.read(ranks.announcer.idle(is_last=True))
    assert last.is_last and not ranks.listener._tables and not ranks.announcer._tables
    assert ranks.seen["sampled before"] > 20


@pytest.mark.parametrize("overlaps", (False, True))
def test_the_schedules_have_what_can_go_wrong(overlaps: bool) -> None:
    """Else the test above shows little."""
    seen: Counter[str] = Counter()
    for seed in range(8):
        rng = random.Random(seed)
        ranks = Ranks(scheduler(20, budget=7), rng, overlaps=overlaps)
        for id in range(12):
            ranks.scheduler.add(sequence(rng, id))
        while ranks.scheduler.has_work:
            ranks.step()
        seen += ranks.seen
        seen["preemptions"] += ranks.scheduler.num_preemptions
        seen["cached"] += ranks.scheduler.prefix_hits
    assert all(seen[name] > 10 for name in ("preemptions", "cached", "cut pictures", "without samples", *POSITIONS)), seen


def test_a_long_context_sends_only_new_blocks() -> None:
    rng = random.Random(0)
    s = scheduler(4000, budget=16000, max_len=16000)
    ranks = Ranks(s, rng)
    ids = [rng.randrange(100, 200) for _ in range(12000)]
    s.add(Sequence(id=5, token_ids=ids, media=[], sampling=SamplingParams(ignore_eos=True), max_tokens=41))
    while s.has_work:
        ranks.step()
    blocks = [told_blocks(message) for message in ranks.messages]
    assert blocks[0] == 3000 and set(blocks[1:]) == {0, 1} and sum(blocks) == 3010
    assert len(ranks.messages[0]) > 12000 and max(map(len, ranks.messages[1:])) < 64


def told_blocks(message: bytes) -> int:
    step = msgspec.msgpack.decode(message, type=Announcement).step
    assert step is not None
    return sum(len(chunk.blocks) for chunk in step.chunks)
