"""The front's end of the line to the ranks: sends requests, hands out events.

Answers arrive in one queue per request, in the event loop that asked. If the ranks fail, every open request gets an error event,
or (`on_rank_failure`: restart) only those whose answer had begun, and the others go to the new ranks; nobody waits for ever.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import itertools
import threading
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.messages import Abort, Add, MediaRef, PromptPositions, TokenEvent
from vlserve.errors import EngineError
from vlserve.ranks.shared_pixels import PixelFiles
from vlserve.ranks.supervisor import Supervisor

if TYPE_CHECKING:
    from vlserve.models.architecture import Positions
    from vlserve.prompt.build import Prompt

MAX_ATTEMPTS = 2  # of one request: one that ends its rank every time must not do so for ever


@dataclass(slots=True, kw_only=True, eq=False)
class Stream:
    """One open request: its events go to `queue` in `loop`."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[TokenEvent]
    request: Add
    attempts: int = 1
    has_begun: bool = False  # tokens have been handed out


class EngineClient(Supervisor):
    """Thread-safe."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._ids = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._pixels_of: dict[int, list[bytes]] = {}  # by request, until the ranks are done with it
        self._pixels = PixelFiles(self._folder.path)
        self.start()
        atexit.register(self.close)

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, max_tokens: int, timeout_s: float | None = None
    ) -> AsyncIterator[TokenEvent]:
        """Events of one request; the last one has a finish_reason. Leaving early aborts it, and so does `timeout_s`."""
        self.check_alive()
        id = next(self._ids)
        digests = [_salted(span.pixels.digest, prompt.cache_salt) for span in prompt.spans]
        request = Add(
            id=id,
            token_ids=prompt.token_ids,
            media=[
                MediaRef(digest=digest, units=list(span.pixels.units), runs=span.runs, start=span.start)
                for span, digest in zip(prompt.spans, digests, strict=True)
            ],
            sampling=sampling,
            max_tokens=max_tokens,
            cache_salt=prompt.cache_salt,
            positions=None if prompt.positions is None else pack_positions(prompt.positions),
        )
        stream = Stream(loop=asyncio.get_running_loop(), queue=asyncio.Queue(), request=request)
        if digests:
            contents = [span.pixels.data.data for span in prompt.spans]
            left = threading.Event()
            try:
                await asyncio.to_thread(self._share_pixels, id, digests, contents, left)
            except asyncio.CancelledError:  # the thread goes on to its next picture
                left.set()
                self._release_pixels([id])
                raise
            del contents
        try:
            with self._lock:
                self.check_alive()
                self._streams[id] = stream
                self._tell(request)
        except BaseException:
            with self._lock:
                self._streams.pop(id, None)
            self._release_pixels([id])
            raise
        late = TokenEvent(id=id, token_id=None, finish_reason="error", error=f"no answer within {timeout_s} s", is_overdue=True)
        timer = stream.loop.call_later(timeout_s, stream.queue.put_nowait, late) if timeout_s is not None else None
        try:
            while True:
                event = await stream.queue.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            if timer is not None:
                timer.cancel()
            with self._lock:
                if self._streams.pop(id, None) is not None and not self._closing.is_set():
                    self._tell(Abort(ids=[id]))

    def fail_all(self, message: str) -> None:
        """End every open request with an error, and refuse new ones."""
        self._give_up(EngineError(message))

    def close(self) -> None:
        super().close()
        atexit.unregister(self.close)

    def check_alive(self) -> None:
        """Raises EngineError while the engine is loading, and when it failed."""
        if self.error is not None:
            raise EngineError(str(self.error))
        if self.ready is None:
            raise EngineError(f"the engine is still loading (stage: {self.stage.name}); try again in 5 s")

    def _pixel_folders(self) -> Sequence[Path]:
        return self._pixels.folders

    def _open_requests(self) -> Iterable[Add]:
        return (stream.request for stream in self._streams.values())

    def _end_begun(self, message: str) -> None:
        """Those whose answer had begun, and those that were tried often enough."""
        with self._lock:
            lost = [id for id, stream in self._streams.items() if stream.has_begun or stream.attempts >= MAX_ATTEMPTS]
            for stream in self._streams.values():
                stream.attempts += 1
            left = [id for id in self._pixels_of if id not in self._streams]
        self._release_pixels(left)  # nobody waits for these, and no rank will say that it is done with them
        self._dispatch([TokenEvent(id=id, token_id=None, finish_reason="error", error=message) for id in lost])

    def _end_all(self, message: str) -> None:
        with self._lock:
            ids = list(self._streams)
        self._dispatch([TokenEvent(id=id, token_id=None, finish_reason="error", error=message) for id in ids])

    def _free(self) -> None:
        self._pixels.close()

    def _dispatch(self, events: Sequence[TokenEvent]) -> None:
        """One wake-up a loop, however many of its requests have news."""
        self._release_pixels([event.id for event in events if event.finish_reason is not None])
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[TokenEvent], TokenEvent]]] = defaultdict(list)
        with self._lock:
            for event in events:
                stream = self._streams.get(event.id)
                if stream is None:
                    continue  # left already
                stream.has_begun = True
                by_loop[stream.loop].append((stream.queue, event))
                if event.finish_reason is not None:
                    del self._streams[event.id]
        for loop, news in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed without waiting for its answers
                loop.call_soon_threadsafe(_put_all, news)

    def _share_pixels(self, id: int, digests: Sequence[bytes], contents: Sequence[memoryview], left: threading.Event) -> None:
        """Put the pictures where the ranks find them, unless the request has `left`."""
        for digest, content in zip(digests, contents, strict=True):
            try:
                self._pixels.put(digest, content)
            except BaseException:
                self._release_pixels([id])
                raise
            with self._lock:
                self._pixels_of.setdefault(id, []).append(digest)
            if left.is_set():
                self._release_pixels([id])
                return

    def _release_pixels(self, ids: Sequence[int]) -> None:
        for id in ids:
            with self._lock:
                digests = self._pixels_of.pop(id, [])
            for digest in digests:
                self._pixels.release(digest)


def _put_all(news: list[tuple[asyncio.Queue[TokenEvent], TokenEvent]]) -> None:
    for queue, event in news:
        queue.put_nowait(event)


def _salted(digest: bytes, salt: str) -> bytes:
    """A picture's name in the caches, different for every salt."""
    return hashlib.blake2b(digest + salt.encode(), digest_size=len(digest)).digest() if salt else digest


def pack_positions(positions: Positions) -> PromptPositions:
    """As the ranks take them."""
    numbers = b"".join(array("i", axis).tobytes() for axis in positions.axes)
    return PromptPositions(num_axes=len(positions.axes), numbers=numbers, next=positions.next)
