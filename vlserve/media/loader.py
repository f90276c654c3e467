"""Loads the pictures of a request: fetched together, measured before anything is decoded, then preprocessed by worker threads.

Owns the request's budgets and the workers. Threads are enough: decoders, the resize and the digest release the
interpreter's lock; what holds it is a few per cent of the work.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from vlserve.config import MediaConfig
from vlserve.errors import EngineError, RequestError
from vlserve.media.decode import Source, decode_image, image_error, measure_image
from vlserve.media.sources import BLANKS, read_source, scheme_of
from vlserve.prompt.chat_messages import ImagePart
from vlserve.timing import PreparationClock
from vlserve.vision.pixels import Pixels

if TYPE_CHECKING:
    from vlserve.media.fetch import Fetcher
    from vlserve.models.architecture import Preprocessor

T = TypeVar("T")
LARGE_PIXELS = 16_000_000  # pictures above are decoded one at a time, since one can take 30 bytes a pixel


class PictureLoader:
    """For many requests and event loops at once. `close` ends the workers."""

    def __init__(self, config: MediaConfig) -> None:
        self.config = config
        self._num_workers = config.media_workers or min(8, os.cpu_count() or 1)
        self._workers = ThreadPoolExecutor(self._num_workers, thread_name_prefix="vlserve-picture")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="vlserve-large-picture")
        self._fetched = _Account(config.max_fetched_mib * 2**20)
        self._fetcher: Future[Fetcher] | None = None
        self._fetcher_lock = threading.Lock()
        # preprocessing needs torch; importing it overlaps with the engine's start
        self._workers.submit(import_module, "vlserve.vision.preprocess")

    async def load(
        self,
        parts: Sequence[ImagePart],
        preprocessor: Preprocessor,
        *,
        max_tokens: int | None = None,
        clock: PreparationClock | None = None,
    ) -> list[Pixels]:
        """One request's pictures, preprocessed, in order.

        Args:
            clock: is told what each picture took.
            max_tokens: image tokens that cannot fit the context anyway; a request that needs more is refused undecoded.

        Raises RequestError naming the field, EngineError when too much is being fetched for others.
        """
        if len(parts) > self.config.limit_images_per_prompt:
            limit = self.config.limit_images_per_prompt
            raise RequestError(f"{len(parts)} pictures in one request; the limit is {limit}", param="messages")
        if not parts:
            return []
        if not preprocessor.placeholders():
            raise RequestError("this model takes no pictures", param=parts[0].param, code="unsupported_parameter")
        clock = clock or PreparationClock()
        loop = asyncio.get_running_loop()
        with self._fetched.reserved() as reserved:
            budget = _Budget(self.config.max_request_image_mib * 2**20)
            fetched = await self._fetch(parts, budget, reserved, clock)
            plan = await loop.run_in_executor(self._workers, self._measure, parts, preprocessor, fetched, budget)
            if max_tokens is not None and plan.num_tokens > max_tokens:
                raise RequestError(
                    f"the pictures take {plan.num_tokens} tokens or more, and max_model_len is {max_tokens}; "
                    "send fewer or smaller pictures, or detail: low",
                    param="messages",
                    code="context_length_exceeded",
                )
            turns = asyncio.Semaphore(self._num_workers)  # so that a request of many pictures leaves room for others

            async def prepare(index: int) -> Pixels:
                async with turns:
                    pool = self._large if plan.is_large[index] else self._workers
                    source, plan.sources[index] = plan.sources[index], None
                    return await loop.run_in_executor(pool, self._prepare, source, parts[index], plan.preprocessors[index], clock)

            return await _all([prepare(index) for index in range(len(parts))])

    def close(self) -> None:
        for pool in (self._workers, self._large):
            pool.shutdown(wait=False)

    async def _fetch(
        self, parts: Sequence[ImagePart], budget: _Budget, reserved: _Reserved, clock: PreparationClock
    ) -> dict[int, bytes]:
        """By index, what had to be fetched."""
        urls = {index: part for index, part in enumerate(parts) if scheme_of(part.source) in ("http", "https")}
        if not urls:
            return {}

        def take(count: int, param: str) -> None:
            budget.take(count, param)
            reserved.take(count)

        with self._fetcher_lock:
            if self._fetcher is None:  # its imports and certificates take a moment, and many servers fetch nothing
                self._fetcher = self._workers.submit(_make_fetcher, self.config)
        fetcher = await asyncio.shield(asyncio.wrap_future(self._fetcher))
        bodies = await fetcher.fetch_all([(part.source.strip(BLANKS), part.param) for part in urls.values()], take, clock)
        return dict(zip(urls, bodies, strict=True))

    def _measure(
        self, parts: Sequence[ImagePart], preprocessor: Preprocessor, fetched: dict[int, bytes], budget: _Budget
    ) -> _Plan:
        """In a worker: read what is here already, and check sizes from the headers."""
        plan = _Plan(sources=[], is_large=[], preprocessors=[_configured(preprocessor, part) for part in parts], num_tokens=0)
        num_pixels = 0
        for index, part in enumerate(parts):
            source = fetched.pop(index) if index in fetched else read_source(part, self.config)
            if isinstance(source, bytes) and scheme_of(part.source) not in ("http", "https"):
                budget.take(len(source), part.param)
            width, height = measure_image(source, param=part.param, config=self.config)
            num_pixels += width * height
            if num_pixels > self.config.max_request_image_pixels:
                limit = self.config.max_request_image_pixels
                raise image_error(
                    part.param, f"the pictures up to this one have {num_pixels} pixels, the limit is {limit}", "image_too_large"
                )
            plan.sources.append(source)
            # an AVIF file's header does not bind its frames; the decoder has a bound of its own, like a large picture's
            is_avif = isinstance(source, bytes) and source[4:8] == b"ftyp"
            plan.is_large.append(width * height > LARGE_PIXELS or is_avif)
            sizes = (width, height), (height, width)  # EXIF may turn it
            plan.num_tokens += min(_count(plan.preprocessors[index], size, part) for size in sizes)
        return plan

    def _prepare(self, source: Source, part: ImagePart, preprocessor: Preprocessor, clock: PreparationClock) -> Pixels:
        """In a worker: one picture from its source to what the encoder takes."""
        with clock.measure(clock.decode_s):
            image = decode_image(source, param=part.param, config=self.config)
        with clock.measure(clock.tiling_s):
            return preprocessor.prepare(image, part.detail)


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What is to be decoded; sources go as they are used."""

    sources: list[Any]
    is_large: list[bool]
    preprocessors: list[Preprocessor]  # with each picture's own options
    num_tokens: int  # at least


class _Budget:
    """Encoded bytes that one request's pictures may have together."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0

    def take(self, count: int, param: str) -> None:
        self._taken += count
        if self._taken > self._limit:
            message = f"the pictures of the request up to this one have more than {self._limit} bytes"
            raise image_error(param, message, "image_file_too_large")


class _Account:
    """Fetched bytes in memory, of all requests. Nobody waits here: two requests could wait for each other."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._lock = limit, 0, threading.Lock()

    @contextmanager
    def reserved(self) -> Iterator[_Reserved]:
        reserved = _Reserved(self)
        try:
            yield reserved
        finally:
            with self._lock:
                self._held -= reserved.count

    def add(self, count: int) -> None:
        with self._lock:
            if self._held + count > self._limit:
                raise EngineError("too many pictures are being fetched for other requests; try again")
            self._held += count


class _Reserved:
    """One request's share of an account, given back when the request is prepared."""

    def __init__(self, account: _Account) -> None:
        self._account, self.count = account, 0

    def take(self, count: int) -> None:
        self._account.add(count)
        self.count += count


def _configured(preprocessor: Preprocessor, part: ImagePart) -> Preprocessor:
    """With the picture's own options; raises RequestError naming the one that is wrong."""
    if not part.options:
        return preprocessor
    try:
        return preprocessor.configured(part.options)
    except RequestError as error:
        theirs, ours = "mm_processor_kwargs.", f"{part.options_param}."
        param = (error.param or "").replace(theirs, ours)
        raise RequestError(str(error).replace(theirs, ours), param=param, code=error.code) from None


def _count(preprocessor: Preprocessor, size: tuple[int, int], part: ImagePart) -> int:
    """Features of a picture; raises RequestError naming the part, where the model takes no picture of such a shape."""
    try:
        return preprocessor.count_features(*size, part.detail)
    except RequestError as error:
        raise image_error(part.param, str(error), error.code) if error.param is None else error from None


def _make_fetcher(config: MediaConfig) -> Fetcher:
    from vlserve.media.fetch import Fetcher

    return Fetcher(config)


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first failure ends the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
