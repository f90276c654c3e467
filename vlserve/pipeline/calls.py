"""How a pipeline is asked: with a call, a list, a stream, and the same for asyncio. Whoever answers is a subclass.

Synchronous calls run on an event loop in a thread of the pipeline's own, so they work in scripts, notebooks
and inside a running loop.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, TypeVar

from vlserve.config import SamplingParams
from vlserve.engine.messages import TokenLogprob
from vlserve.errors import EngineError, RequestError
from vlserve.pipeline.outputs import Completion, Delta
from vlserve.prompt.chat_messages import Turn, is_batch, read_prompt

T = TypeVar("T")
Self = TypeVar("Self", bound="PipelineCalls")


class PipelineCalls(ABC):
    """`max_at_once` prompts of a list are answered at a time."""

    max_at_once: int

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_lock = threading.Lock()

    @abstractmethod
    def answers(self, turns: Sequence[Turn], params: SamplingParams) -> AsyncIterator[Delta]:
        """One answer's pieces; the last has finish_reason, usage and timing. Raises RequestError and EngineError."""

    @abstractmethod
    def close(self) -> None: ...

    def __call__(
        self, prompt: Any, *, sampling: SamplingParams | None = None, progress: bool | None = None, **fields: Any
    ) -> Any:
        """One `Completion` for one prompt, a list of them, in order, for a list.

        Args:
            prompt: see the class. sampling: or its fields by keyword, e.g. max_tokens=64, temperature=0.0.
            progress: a bar over a list's answers; default: on a terminal.
        """
        params = _sampling(sampling, fields)
        if not is_batch(prompt):
            return self._run(self.agenerate(prompt, sampling=params))
        show = sys.stderr.isatty() if progress is None else progress
        return self._run(self._generate_all(prompt, params, show))

    def stream(self, prompt: Any, *, sampling: SamplingParams | None = None, **fields: Any) -> Iterator[Delta]:
        """The answer piece by piece. Leaving the loop early ends the request."""
        pieces: queue.SimpleQueue[Delta | BaseException | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for delta in self.astream(prompt, sampling=sampling, **fields):
                    pieces.put(delta)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)
                raise

        task = asyncio.run_coroutine_threadsafe(pump(), self._background())
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, asyncio.CancelledError):
                    raise EngineError("the pipeline was closed")
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            task.cancel()

    async def agenerate(self, prompt: Any, *, sampling: SamplingParams | None = None, **fields: Any) -> Completion:
        """As calling the pipeline with one prompt, for asyncio."""
        return collect([delta async for delta in self.astream(prompt, sampling=sampling, **fields)])

    async def astream(self, prompt: Any, *, sampling: SamplingParams | None = None, **fields: Any) -> AsyncIterator[Delta]:
        """As `stream`, for asyncio."""
        async for delta in self.answers(read_prompt(prompt), _sampling(sampling, fields)):
            yield delta

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def _generate_all(self, prompts: Sequence[Any], sampling: SamplingParams, show: bool) -> list[Completion]:
        from tqdm import tqdm

        limit = asyncio.Semaphore(self.max_at_once)
        with tqdm(total=len(prompts), disable=not show, unit="answer") as bar:

            async def one(prompt: Any) -> Completion:
                async with limit:
                    completion = await self.agenerate(prompt, sampling=sampling)
                    bar.update()
                    return completion

            tasks = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    def _background(self) -> asyncio.AbstractEventLoop:
        with self._loop_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run_loop, args=(self._loop,), name="vlserve-loop", daemon=True).start()
            return self._loop

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._background())
        try:
            return future.result()
        except CancelledError:
            raise EngineError("the pipeline was closed") from None
        except BaseException:  # Ctrl-C too: the request must not go on
            future.cancel()
            raise

    def _end_loop(self) -> None:
        with self._loop_lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(_end_loop(), loop)


def collect(deltas: Sequence[Delta]) -> Completion:
    """The whole answer from its pieces."""
    last = deltas[-1]
    assert last.finish_reason is not None and last.usage is not None and last.timing is not None
    logprobs: list[TokenLogprob] = [entry for delta in deltas for entry in delta.logprobs or ()]
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(id for delta in deltas for id in delta.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timing=last.timing,
        logprobs=tuple(logprobs) if logprobs else None,
    )


def _sampling(sampling: SamplingParams | None, fields: dict[str, Any]) -> SamplingParams:
    if sampling is not None and fields:
        raise RequestError(f"give sampling or its fields, not both (got {', '.join(fields)})", param="sampling")
    if sampling is not None:
        return sampling
    return SamplingParams(**fields)


async def _end_loop() -> None:
    """Cancel what the loop still runs, so that nobody waits for it, then stop it."""
    loop = asyncio.get_running_loop()
    others = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    loop.stop()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
