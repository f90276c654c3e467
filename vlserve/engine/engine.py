"""The engine: sequences in, token events out, one step at a time, in whatever process it is put."""

from __future__ import annotations

import contextlib
import logging
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from vlserve.config import EngineConfig
from vlserve.engine.cuda_graphs import Recorder
from vlserve.engine.grammar import GrammarCompiler
from vlserve.engine.loading import Progress, load_model, resolve_device, resolve_max_model_len
from vlserve.engine.memory import in_the_plans_words, planned_bytes
from vlserve.engine.messages import STEP_TOKENS, Add, PromptPositions, Stats, TokenEvent
from vlserve.engine.pixel_store import PixelStore
from vlserve.engine.runner import Runner, Started
from vlserve.engine.scheduler import Chunk, Scheduler
from vlserve.engine.sequence import MediaSpan, Sequence, TokenPositions
from vlserve.llm.block_pool import BlockPool
from vlserve.llm.tensor_parallel import ALONE, Group, Split
from vlserve.models.checkpoint import Checkpoint, find_folder, read_checkpoint
from vlserve.plan.tp_plan import check_tp

log = logging.getLogger(__name__)
COMPILING_PAUSE_S = 0.005  # when grammars are compiled and there is nothing else to do


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a rank sits: the ranks it shares the model with, its place on its machine, where it finds pictures' units, and what
    makes graphs for it where that is not CUDA."""

    group: Group = ALONE
    local_rank: int = 0
    pixels: PixelStore | None = None
    recorder: Recorder | None = None


def build_runner(
    checkpoint: Checkpoint, config: EngineConfig, seat: Seat, progress: Progress, in_use: Callable[[], set[bytes]] = set
) -> Runner:
    """This rank's model with its caches, warmed up; all ranks do it together."""
    check_tp(
        checkpoint.config,
        config.tp,
        replicate_kv_heads=config.replicate_kv_heads,
        expert_parallel=config.expert_parallel,
    )
    progress("weights", 0, 0)
    split = Split(group=seat.group, replicate_kv_heads=config.replicate_kv_heads, expert_parallel=config.expert_parallel)
    model = load_model(checkpoint, config, split, resolve_device(config, seat.local_rank), progress)
    progress("kv cache", 0, 0)
    max_model_len = resolve_max_model_len(config, model)
    with in_the_plans_words(checkpoint, config, model.decoder.norm.device):
        runner = Runner(
            model,
            config=config,
            max_model_len=max_model_len,
            end_token_ids=frozenset(id for id in checkpoint.end_token_ids if id < model.decoder.config.vocab_size),
            in_use=in_use,
            pixels=seat.pixels,
            planned=planned_bytes(checkpoint, config, model, max_model_len),
            recorder=seat.recorder,
        )
    progress("warm-up", 0, 0)
    runner.warm_up()
    return runner


class Engine:
    """Add requests, call `step` while `has_work`; every request ends in one event with a finish_reason.

    With several ranks this is rank 0, and the others call `Runner.follow` until it says that it was the last step.
    """

    def __init__(
        self, config: EngineConfig, progress: Progress = lambda name, done, total: None, *, seat: Seat | None = None
    ) -> None:
        checkpoint = read_checkpoint(find_folder(config.model, config.revision))
        self.runner = build_runner(checkpoint, config, seat or Seat(), progress, self._media_in_use)
        self.scheduler = Scheduler(
            BlockPool(self.runner.num_blocks, config.block_size, prefix_caching=config.prefix_caching),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.runner.max_model_len,
            end_token_ids=self.runner.end_token_ids,
        )
        self.grammars = GrammarCompiler(
            checkpoint.folder,
            vocab_size=self.runner.model.decoder.config.vocab_size,
            end_token_ids=self.runner.end_token_ids,
            feature_token_ids=checkpoint.feature_token_ids,
        )
        self.overlaps = config.overlap and self.runner.device.type == "cuda"
        self._open: Started | None = None  # the device computes it
        self._step_sizes, self._step_tokens = [0] * (len(STEP_TOKENS) + 1), 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._open is not None

    def add(self, request: Add, pixels: list[torch.Tensor] | None = None) -> None:
        """Queue a request; `pixels` are its pictures' units [bytes] uint8, in order, and are looked for where they are not given.

        Raises FileNotFoundError when they are gone, ValueError for positions that the decoder does not take.
        """
        if pixels is None:
            open_pixels = self.runner.pixels.open
            pixels = [open_pixels(ref.digest, sum(unit.num_bytes for unit in ref.units)) for ref in request.media]
        decoder = self.runner.model.decoder
        positions = None if request.positions is None else _positions(request.positions, decoder.num_position_axes)
        media = [
            MediaSpan(digest=ref.digest, units=ref.units, runs=ref.runs, layout_start=ref.start, pixels=numbers)
            for ref, numbers in zip(request.media, pixels, strict=True)
        ]
        self.scheduler.add(
            Sequence(
                id=request.id,
                token_ids=list(request.token_ids),
                media=media,
                positions=positions,
                sampling=request.sampling,
                max_tokens=request.max_tokens,
                cache_salt=request.cache_salt.encode(),
                grammar=None if request.sampling.structured is None else self.grammars.start(request.sampling.structured),
            )
        )

    def abort(self, ids: Iterable[int]) -> list[TokenEvent]:
        return self._ended(self.scheduler.abort(ids))

    def step(self) -> list[TokenEvent]:
        """Schedule and start a step, take in the one before it, and sample; without `overlaps`, take in this one as well."""
        events = self._ended(self.scheduler.fail_unready())
        chunks = self.scheduler.schedule()
        step = None
        if chunks:
            with self._failing(chunks, events):
                step = self.runner.start(chunks)
        elif self._open is None and self.has_work:
            time.sleep(COMPILING_PAUSE_S)
        events += self._finish()
        if step is not None:
            self._count(chunks)
            with self._failing(chunks, events):
                self.runner.sample(step)
                self.scheduler.expect(chunks)
                self._open = step
        return events if self.overlaps else events + self._finish()

    def _finish(self) -> list[TokenEvent]:
        """Take in the step that the device computes; what it sampled is known from here on."""
        step, self._open = self._open, None
        booked, failed = list[TokenEvent](), list[TokenEvent]()
        if step is not None:
            with self._failing(step.chunks, failed):
                self.scheduler.commit(step.chunks, self.runner.finish(step), booked)
        return self._ended(booked) + failed

    @contextlib.contextmanager
    def _failing(self, chunks: list[Chunk], events: list[TokenEvent]) -> Iterator[None]:
        """What breaks in it ends these chunks' requests, not the engine; with several ranks it is raised, since they may have
        parted in the middle."""
        try:
            yield
        except Exception as error:  # a family's code raises what it likes
            if self.runner.group.size > 1:
                raise
            log.exception("a step of %d requests failed", len(chunks))
            reason = f"the engine could not compute this step: {type(error).__name__}"
            events += self._ended(self.scheduler.fail(chunks, reason))

    def _count(self, chunks: list[Chunk]) -> None:
        number = sum(chunk.stop - chunk.start for chunk in chunks)
        self._step_tokens += number
        self._step_sizes[bisect_left(STEP_TOKENS, number)] += 1

    def stats(self) -> Stats:
        """A few additions; cheap enough for every step."""
        scheduler, pool, runner = self.scheduler, self.scheduler.pool, self.runner
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_used_blocks=pool.num_blocks - pool.num_free,
            num_blocks=pool.num_blocks,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            image_queries=runner.image_queries,
            image_hits=runner.image_hits,
            num_preemptions=scheduler.num_preemptions,
            encode_s=runner.encode_s,
            step_s=runner.step_s,
            comm_s=runner.comm_s,
            device_bytes=[runner.device_bytes()],
            step_sizes=self._step_sizes,
            step_tokens=self._step_tokens,
        )

    def _ended(self, events: list[TokenEvent]) -> list[TokenEvent]:
        self.runner.forget([event.id for event in events if event.finish_reason])
        return events

    def _media_in_use(self) -> set[bytes]:
        """Pictures whose features are not all used yet, of running requests."""
        return {media.digest for s in self.scheduler.running for media in s.media if s.num_computed < media.stop}


def _positions(given: PromptPositions, num_axes: int) -> TokenPositions:
    if given.num_axes != num_axes:
        raise ValueError(f"the prompt has positions of {given.num_axes} parts, and the decoder takes {num_axes}")
    numbers = array("i", given.numbers)
    length = len(numbers) // given.num_axes
    return TokenPositions([numbers[axis * length : (axis + 1) * length] for axis in range(given.num_axes)], given.next)
