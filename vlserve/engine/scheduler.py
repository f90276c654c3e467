"""Decides who computes how many tokens in the next step, and takes in what came out.

The scheduler knows nothing of tensors: it moves sequences between waiting and running, and blocks
between sequences and the pool. Every added sequence ends in exactly one event with a finish_reason.

A step is scheduled, expected once it has been started, and committed when its tokens are there. Between the two the next one may
be scheduled: what a sequence gave up in the meantime, the device takes over only after it has finished with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from vlserve.engine.messages import FinishReason, TokenEvent, TokenLogprob
from vlserve.engine.sequence import UNKNOWN, MediaSpan, Sequence
from vlserve.llm.block_pool import BlockPool
from vlserve.plan.footprint import most_features


@dataclass(slots=True, kw_only=True, eq=False)
class Chunk:
    """Tokens start..stop of a sequence, into its `blocks`; `samples` when the chunk reaches its last token."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool
    blocks: list[int]

    @property
    def is_current(self) -> bool:
        """The sequence has not ended nor been preempted since."""
        return self.blocks is self.sequence.blocks

    @property
    def media(self) -> list[MediaSpan]:
        """Pictures with features among these tokens."""
        return [media for media in self.sequence.media if media.overlaps(self.start, self.stop)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    token_id: int
    logprob: TokenLogprob | None = None
    error: str | None = None  # there is no token, for this reason


class Scheduler:
    """First come, first served; a step takes decodes first, then prefill chunks, within the token budget.

    Pictures in a step have `most_features` together at most, for which memory is set aside: the prefix cache may have all but the
    last tokens of many prompts, and each picture is encoded as a whole for them.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        end_token_ids: frozenset[int],
    ) -> None:
        self.pool = pool
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len, self.end_token_ids = max_model_len, end_token_ids
        self.most_features = most_features(max_num_batched_tokens, max_model_len)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.num_preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # tokens

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        assert 0 < len(sequence.token_ids) < self.max_model_len, "the front checks lengths"
        self.waiting.append(sequence)

    def abort(self, ids: Iterable[int]) -> list[TokenEvent]:
        """End the named sequences; ids that are not here ended already."""
        return [self._finish(s, None, "abort") for s in self._select(set(ids))]

    def fail(self, chunks: Iterable[Chunk], message: str) -> list[TokenEvent]:
        """End the sequences of a step that broke."""
        return [self._finish(c.sequence, None, "error", error=message) for c in chunks if not c.sequence.has_ended]

    def fail_unready(self) -> list[TokenEvent]:
        """End the sequences whose grammar cannot be compiled."""
        broken = [(s, s.grammar.error) for s in self.waiting if s.grammar is not None and s.grammar.error is not None]
        return [self._finish(sequence, None, "error", error=error) for sequence, error in broken]

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, with their blocks allocated; empty when there is nothing to do."""
        chunks: list[Chunk] = []
        budget, pictures = self.max_num_batched_tokens, dict[bytes, int]()
        is_decode = {s.id: len(s.token_ids) - s.num_computed == 1 for s in self.running}
        for sequence in sorted(self.running, key=lambda s: not is_decode[s.id]):
            if budget == 0:
                break
            if not sequence.blocks:  # preempted for one before it
                continue
            if self._is_full(sequence):  # its last token is on its way
                continue
            chunk = self._chunk(sequence, sequence.num_computed, budget, pictures)
            if chunk.stop == chunk.start or not self._make_room(sequence, chunk.stop, chunks):
                continue
            chunks.append(chunk)
            budget -= chunk.stop - chunk.start
        ready = [s for s in self.waiting if s.is_ready]  # the others do not hold up those behind them
        for sequence in ready:
            if budget == 0 or len(self.running) >= self.max_num_seqs:
                break
            admitted = self._admit(sequence, budget, pictures)
            if admitted is None:
                break
            chunks.append(admitted)
            budget -= admitted.stop - admitted.start
        is_stuck = not chunks and (self.running or ready) and not any(s.is_unknown for s in (*self.running, *self.waiting))
        assert not is_stuck, "a step without work: the KV cache holds less than one sequence"
        return chunks

    def expect(self, chunks: list[Chunk]) -> None:
        """A step was started: its tokens count as computed, and what it samples as there, though unknown."""
        for chunk in chunks:
            if chunk.is_current:
                chunk.sequence.num_computed = chunk.stop
                if chunk.samples:
                    chunk.sequence.token_ids.append(UNKNOWN)

    def commit(self, chunks: list[Chunk], sampled: list[Sampled], events: list[TokenEvent] | None = None) -> list[TokenEvent]:
        """Book what an expected step computed.

        Args:
            sampled: one entry for each chunk that samples, in order.
            events: to which the result is added, so that what has been booked is there should a grammar raise.
        """
        events = [] if events is None else events
        tokens = iter(sampled)
        for chunk in chunks:
            sequence, token = chunk.sequence, next(tokens) if chunk.samples else None
            if sequence.has_ended:
                continue
            if chunk.is_current:
                self._register_full_blocks(chunk)
            if token is None:
                continue
            if token.error is not None:
                events.append(self._finish(sequence, None, "error", error=token.error))
                continue
            sequence.token_ids[chunk.stop] = token.token_id
            if sequence.grammar is not None and not sequence.grammar.accept(token.token_id):
                events.append(self._finish(sequence, None, "error", error="a token does not fit the answer's grammar"))
                continue
            reason = self._finish_reason(sequence, token.token_id)
            if reason is None:
                events.append(self._event(sequence, token, None))
            else:
                events.append(self._finish(sequence, token, reason))
        return events

    def _chunk(self, sequence: Sequence, start: int, budget: int, pictures: dict[bytes, int]) -> Chunk:
        stop = self._stop(sequence, start, budget, pictures)
        samples = stop == len(sequence.token_ids)
        return Chunk(sequence=sequence, start=start, stop=stop, samples=samples, blocks=sequence.blocks)

    def _stop(self, sequence: Sequence, start: int, budget: int, pictures: dict[bytes, int]) -> int:
        """Where a chunk ends: with the budget, or before a picture that would be too many; `pictures`: features of the step's."""
        stop = min(len(sequence.token_ids), start + budget)
        for media in sequence.media:
            if media.overlaps(start, stop) and media.digest not in pictures:
                if sum(pictures.values()) + media.num_features > self.most_features:
                    return max(start, media.start)
                pictures[media.digest] = media.num_features
        return stop

    def _num_missing_blocks(self, sequence: Sequence, stop: int) -> int:
        return max(0, -(-stop // self.pool.block_size) - len(sequence.blocks))

    def _make_room(self, sequence: Sequence, stop: int, chunks: list[Chunk]) -> bool:
        """Allocate blocks up to token `stop`; preempts the youngest sequences not in this step. False: preempted itself."""
        needed = self._num_missing_blocks(sequence, stop)
        while needed > self.pool.num_free:
            scheduled = {c.sequence.id for c in chunks}
            victim = next((s for s in reversed(self.running) if s.id not in scheduled), sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(needed)
        return True

    def _admit(self, sequence: Sequence, budget: int, pictures: dict[bytes, int]) -> Chunk | None:
        """Move a waiting sequence to running, from its cached prefix on; None when blocks are short, or pictures too many."""
        size = self.pool.block_size
        # the last token is always computed: its logits are needed
        known = self.pool.match(sequence.digest_blocks((len(sequence.token_ids) - 1) // size, size))
        start = len(known) * size
        stop = self._stop(sequence, start, budget, pictures)
        fresh = -(-stop // size) - len(known)
        if stop == start or fresh + self.pool.num_taken_by(known) > self.pool.num_free:
            return None
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.pool.share(known)
        sequence.blocks = known + self.pool.allocate(fresh)
        sequence.num_computed = start
        if sequence.started is None:
            sequence.started = time.monotonic()
            sequence.num_cached_tokens = start
            self.prefix_queries += len(sequence.token_ids)
            self.prefix_hits += start
        return Chunk(sequence=sequence, start=start, stop=stop, samples=stop == len(sequence.token_ids), blocks=sequence.blocks)

    def _preempt(self, sequence: Sequence) -> None:
        """Give its blocks back; it waits, first in line, and is computed again (from what is still cached)."""
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)

    def _register_full_blocks(self, chunk: Chunk) -> None:
        size = self.pool.block_size
        first, full = chunk.start // size, chunk.stop // size
        for i, digest in enumerate(chunk.sequence.digest_blocks(full, size)[first:], start=first):
            self.pool.register(chunk.blocks[i], digest)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        sampling = sequence.sampling
        if sequence.grammar is not None and sequence.grammar.is_finished:
            return "stop"  # also where min_tokens or ignore_eos ask for more: nothing can follow
        if sequence.num_output_tokens >= sampling.min_tokens and (
            token_id in sampling.stop_token_ids or (token_id in self.end_token_ids and not sampling.ignore_eos)
        ):
            return "stop"
        return "length" if self._is_full(sequence) else None

    def _is_full(self, sequence: Sequence) -> bool:
        return sequence.num_output_tokens >= sequence.max_tokens or len(sequence.token_ids) >= self.max_model_len

    def _finish(self, sequence: Sequence, token: Sampled | None, reason: FinishReason, error: str | None = None) -> TokenEvent:
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.grammar is not None:
            sequence.grammar.cancel()
        self._release(sequence)
        sequence.has_ended = True
        return self._event(sequence, token, reason, error)

    def _event(
        self, sequence: Sequence, token: Sampled | None, reason: FinishReason | None, error: str | None = None
    ) -> TokenEvent:
        return TokenEvent(
            id=sequence.id,
            token_id=token.token_id if token else None,
            finish_reason=reason,
            logprob=token.logprob if token else None,
            error=error,
            cached_tokens=sequence.num_cached_tokens,
            queue_s=(sequence.started or time.monotonic()) - sequence.arrived,
            encode_s=sequence.encode_s,
        )

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _select(self, ids: set[int]) -> list[Sequence]:
        return [s for s in [*self.running, *self.waiting] if s.id in ids]
