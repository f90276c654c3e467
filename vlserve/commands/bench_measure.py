"""What one tensor-parallel degree does under a load: starts an engine, warms it up, asks, and gives the figures.

Judges nothing; that is bench_advice.py's.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from vlserve.config import SamplingParams

if TYPE_CHECKING:
    from vlserve.engine.messages import Stats
    from vlserve.pipeline.outputs import Completion
    from vlserve.pipeline.vl_pipeline import VLPipeline

WORDS = (
    "a",
    "one",
    "red",
    "blue",
    "the",
    "big",
    "and",
    "picture",
    "shows",
    "of",
    "two",
    "what",
    "small",
    "lines",
    "left",
    "right",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every degree is asked; the same texts and pictures for each, and none twice."""

    requests: int  # in each repetition
    concurrency: tuple[int, ...]  # requests at once, one level after another
    pictures: int  # of a request
    picture_size: tuple[int, int]  # width, height in pixels
    prompt_tokens: int  # of a request's own text; pictures and chat template come on top
    answer_tokens: int
    repetitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One degree with `concurrency` requests at once. Medians of the repetitions, and in each of the answers; seconds."""

    tp: int
    concurrency: int
    requests_per_s: float
    tokens_per_s: float  # of answers
    answer_s: float  # from asking to the last token
    ttft_s: float  # to the first token
    token_s: float  # each later token
    comm_share: float | None  # of the engine's steps, on rank 0; None where it is not measured
    spread: float  # of tokens_per_s over the repetitions: (most - least) / median

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens_per_s / self.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Degree:
    """One degree's engine and its rows, by growing concurrency."""

    tp: int
    device: str
    dtype: str
    load_s: float  # until the engine was ready
    kv_tokens: int  # that the KV cache holds
    prompt_tokens: int  # of a request, all of it (median)
    image_tokens: int  # of these, the pictures'
    device_bytes: list[dict[str, int]]  # of each rank, by kind, after the load
    rows: list[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """One pass of `Load.requests` requests."""

    seconds: float
    answers: list[Completion]
    step_s: float
    comm_s: float


def measure(options: dict[str, Any], load: Load, on_answer: Callable[[str], None]) -> Degree:
    """Run the load on an engine of its own; nothing of it is left afterwards.

    Args:
        options: fields of EngineConfig, with `tp`.
        on_answer: called after each answer with what is being done.

    Raises ConfigError, ModelError or EngineError when this degree cannot run, RequestError when the load does not fit the model.
    """
    from vlserve.pipeline.vl_pipeline import VLPipeline

    begun = time.perf_counter()
    with VLPipeline(**options) as pipe:
        return asyncio.run(_measure(pipe, load, time.perf_counter() - begun, on_answer))


def num_answers(load: Load) -> int:
    """How often `measure` calls `on_answer`."""
    warm_up = sum(min(level, load.requests) for level in load.concurrency)
    return warm_up + load.requests * load.repetitions * len(load.concurrency)


async def _measure(pipe: VLPipeline, load: Load, load_s: float, on_answer: Callable[[str], None]) -> Degree:
    make = PromptMaker(pipe.tokenizer.encode_plain, load)
    for level in load.concurrency:  # every size of step once, so that no repetition pays for what is made at first use
        await _repeat(pipe, load, make(min(level, load.requests)), level, partial(on_answer, "warm-up"))
    found: dict[int, list[Repetition]] = {level: [] for level in load.concurrency}
    for _ in range(load.repetitions):
        for level in load.concurrency:  # in turn, so that a slow minute of the machine does not hit one level alone
            found[level].append(await _repeat(pipe, load, make(load.requests), level, partial(on_answer, f"{level} at once")))
    ready, stats = pipe.client.ready, pipe.client.stats
    assert ready is not None and stats is not None
    answers = [answer for repetitions in found.values() for repetition in repetitions for answer in repetition.answers]
    return Degree(
        tp=pipe.config.tp,
        device=ready.device,
        dtype=ready.dtype,
        load_s=load_s,
        kv_tokens=ready.num_blocks * ready.block_size,
        prompt_tokens=round(statistics.median(answer.usage.prompt_tokens for answer in answers)),
        image_tokens=round(statistics.median(answer.usage.image_tokens for answer in answers)),
        device_bytes=stats.device_bytes,
        rows=[summarise(pipe.config.tp, level, repetitions) for level, repetitions in found.items()],
    )


async def _repeat(pipe: VLPipeline, load: Load, prompts: Sequence[Any], level: int, done: Callable[[], None]) -> Repetition:
    """Ask all prompts, `level` at once: who has an answer asks the next."""
    sampling = SamplingParams(max_tokens=load.answer_tokens, ignore_eos=True)
    waiting, answers = iter(prompts), []

    async def ask() -> None:
        for prompt in waiting:
            answers.append(await pipe.agenerate(prompt, sampling=sampling))
            done()

    step_s, comm_s = _engine_seconds(pipe.client.stats)
    begun = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(level)))
    seconds = time.perf_counter() - begun
    # the last answer's token and these came in one message
    now_step_s, now_comm_s = _engine_seconds(pipe.client.stats)
    return Repetition(seconds=seconds, answers=answers, step_s=now_step_s - step_s, comm_s=now_comm_s - comm_s)


def summarise(tp: int, concurrency: int, repetitions: Sequence[Repetition]) -> Row:
    """The medians of all repetitions of one level."""

    def of_answers(seconds: Callable[[Completion], float]) -> float:
        return statistics.median(statistics.median(map(seconds, one.answers)) for one in repetitions)

    def token_s(answer: Completion) -> float:
        return (answer.timing.total_s - answer.timing.ttft_s) / (answer.usage.completion_tokens - 1)

    rates = [sum(answer.usage.completion_tokens for answer in one.answers) / one.seconds for one in repetitions]
    shares = [one.comm_s / one.step_s for one in repetitions if one.step_s > 0]
    return Row(
        tp=tp,
        concurrency=concurrency,
        requests_per_s=statistics.median(len(one.answers) / one.seconds for one in repetitions),
        tokens_per_s=statistics.median(rates),
        answer_s=of_answers(lambda answer: answer.timing.total_s),
        ttft_s=of_answers(lambda answer: answer.timing.ttft_s),
        token_s=of_answers(token_s),
        comm_share=statistics.median(shares) if shares else None,
        spread=(max(rates) - min(rates)) / statistics.median(rates),
    )


class PromptMaker:
    """Gives prompts that no cache has seen: random words and noise. Two makers give the same ones in the same order."""

    def __init__(self, encode: Callable[[str], list[int]], load: Load) -> None:
        self._load, self._random = load, random.Random(0)
        self._lengths = {word: len(encode(" " + word)) for word in WORDS}

    def __call__(self, number: int) -> list[Any]:
        return [self._prompt() for _ in range(number)]

    def _prompt(self) -> Any:
        from PIL import Image

        words, num_tokens = [], 0
        while num_tokens < self._load.prompt_tokens:
            words.append(self._random.choice(WORDS))
            num_tokens += self._lengths[words[-1]]
        text = " ".join(words)
        width, height = size = self._load.picture_size
        noise = (self._random.randbytes(3 * width * height) for _ in range(self._load.pictures))
        pictures = [Image.frombytes("RGB", size, pixels) for pixels in noise]
        return (text, pictures) if pictures else text


def _engine_seconds(stats: Stats | None) -> tuple[float, float]:
    """(in steps, of these in communication) on rank 0 since the engine started; 0 where they are not counted."""
    return getattr(stats, "step_s", 0.0), getattr(stats, "comm_s", 0.0)
