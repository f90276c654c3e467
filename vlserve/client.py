"""The front's end of the line to the rank: starts it, watches it, sends requests, hands out events.

One thread owns the sockets and the process. Answers arrive in one queue per request, in the event loop
that asked. If the rank fails, every open request gets an error event; nobody waits for ever.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from vlserve import errors
from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.messages import Abort, Add, Failed, FromRank, ImageRef, Ready, Shutdown, Stage, Stats, Step, TokenEvent
from vlserve.errors import EngineError, VLServeError
from vlserve.rank import RankArguments

if TYPE_CHECKING:
    from vlserve.prompt import Prompt

log = logging.getLogger(__name__)
POLL_MS = 200  # how soon a dead rank is noticed


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One open request: its events go to `queue` in `loop`."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[TokenEvent]


class EngineClient:
    """Thread-safe. `ready` is set once the rank serves; `error` once it never will (again)."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.stage = Stage(name="starting")
        self.ready: Ready | None = None
        self.error: VLServeError | None = None
        self.stats: Stats | None = None  # the latest
        self.on_failure: Callable[[VLServeError], None] = lambda error: None
        self._ids = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._lock = threading.Lock()
        self._settled = threading.Event()  # ready or failed
        self._closing = threading.Event()
        self._last_sign = time.monotonic()
        self._encoder = msgspec.msgpack.Encoder()
        self._folder = Path(tempfile.mkdtemp(prefix="vlserve-"))  # mode 0700
        self._context = zmq.Context()
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.bind("inproc://outbox")
        self._thread = threading.Thread(target=self._run, name="vlserve-client", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def wait_ready(self, on_stage: Callable[[Stage], None] = lambda stage: None) -> Ready:
        """Block until the rank serves; raises what it failed with."""
        shown = None
        while not self._settled.wait(0.05):
            if self.stage is not shown:
                shown = self.stage
                on_stage(shown)
        if self.error is not None:
            raise self.error
        assert self.ready is not None
        return self.ready

    @property
    def is_overdue(self) -> bool:
        """A step has been running for longer than it may."""
        return bool(self._streams) and time.monotonic() - self._last_sign > self.config.step_timeout_s

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, max_tokens: int, timeout_s: float | None = None
    ) -> AsyncIterator[TokenEvent]:
        """Events of one request; the last one has a finish_reason. Leaving early aborts it, and so does `timeout_s`."""
        stream = Stream(loop=asyncio.get_running_loop(), queue=asyncio.Queue())
        id = next(self._ids)
        images = [
            ImageRef(
                start=span.start,
                num_tokens=span.tiles.num_tokens,
                digest=_salted(span.tiles.digest, prompt.cache_salt),
                num_tiles=len(span.tiles.pixels),
            )
            for span in prompt.spans
        ]
        request = Add(
            id=id,
            token_ids=prompt.token_ids,
            images=images,
            sampling=sampling,
            max_tokens=max_tokens,
            cache_salt=prompt.cache_salt,
        )
        frames: list[Any] = [self._encoder.encode(request), *(span.tiles.pixels.numpy() for span in prompt.spans)]
        with self._lock:
            self.check_alive()
            if not self._streams:
                self._last_sign = time.monotonic()
            self._streams[id] = stream
            self._outbox.send_multipart(frames)
        del frames  # the tiles are the rank's now
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
                    self._outbox.send(self._encoder.encode(Abort(ids=[id])))

    def fail_all(self, message: str) -> None:
        """End every open request with an error, and refuse new ones."""
        self._give_up(EngineError(message))

    def close(self) -> None:
        """End the rank and free everything; safe to call twice, and from any thread."""
        if self._closing.is_set():
            return
        self._give_up(EngineError("the engine was closed"))
        self._closing.set()
        self._thread.join(timeout=10)
        atexit.unregister(self.close)

    def check_alive(self) -> None:
        """Raises EngineError while the engine is loading, and when it failed."""
        if self.error is not None:
            raise EngineError(str(self.error))
        if self.ready is None:
            raise EngineError(f"the engine is still loading (stage: {self.stage.name})")

    def _run(self) -> None:
        """The thread: starts the rank, then moves messages until the end."""
        requests, events, inbox = (self._context.socket(kind) for kind in (zmq.PUSH, zmq.PULL, zmq.PULL))
        process = None
        try:
            addresses = [f"ipc://{self._folder}/{name}" for name in ("requests", "events")]
            for socket in (requests, events, inbox):
                socket.set_hwm(0)
            requests.bind(addresses[0])
            events.bind(addresses[1])
            inbox.connect("inproc://outbox")
            process = self._start_rank(*addresses)
            self._move_messages(process, inbox, requests, events)
        except Exception as error:
            log.exception("the client's thread failed")
            self._give_up(EngineError(f"the engine cannot be reached: {error}"))
        finally:
            if process is not None:
                self._end_rank(process, requests)
            self._context.destroy(linger=0)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start_rank(self, requests: str, events: str) -> subprocess.Popen[bytes]:
        # The package's folder goes last on the path: found when vlserve runs from a checkout without
        # being installed, while nothing else in that folder hides an installed package.
        root = str(Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
        process = subprocess.Popen(
            [sys.executable, "-m", "vlserve.rank"],
            stdin=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )
        arguments = RankArguments(config=self.config, requests=requests, events=events, parent=os.getpid())
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a rank that died already is noticed below
            process.stdin.write(msgspec.json.encode(arguments) + b"\n")
            process.stdin.flush()
        return process

    def _move_messages(
        self,
        process: subprocess.Popen[bytes],
        inbox: zmq.Socket[bytes],
        requests: zmq.Socket[bytes],
        events: zmq.Socket[bytes],
    ) -> None:
        decoder = msgspec.msgpack.Decoder(FromRank)
        poller = zmq.Poller()
        poller.register(inbox, zmq.POLLIN)
        poller.register(events, zmq.POLLIN)
        while self.error is None:
            readable = dict(poller.poll(POLL_MS))
            if inbox in readable:
                frames = inbox.recv_multipart(copy=False)
                with contextlib.suppress(zmq.Again):  # no peer: the rank is gone, which is noticed below
                    requests.send_multipart(frames, zmq.NOBLOCK, copy=False)
            if events in readable:
                self._handle(decoder.decode(events.recv()))
            elif process.poll() is not None:
                self._give_up(EngineError(f"the engine's process ended ({_describe_exit(process.returncode)})"))
            self._check_deadlines()

    def _handle(self, message: FromRank) -> None:
        self._last_sign = time.monotonic()
        if isinstance(message, Step):
            self.stats = message.stats
            self._dispatch(message.events)
        elif isinstance(message, Stage):
            self.stage = message
        elif isinstance(message, Ready):
            self.stage, self.ready = Stage(name="ready"), message
            self._settled.set()
        elif isinstance(message, Failed):
            kind = getattr(errors, message.kind, EngineError)
            self._give_up(kind(message.message))

    def _dispatch(self, events: Sequence[TokenEvent]) -> None:
        """One wake-up a loop, however many of its requests have news."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[TokenEvent], TokenEvent]]] = defaultdict(list)
        with self._lock:
            for event in events:
                stream = self._streams.get(event.id)
                if stream is None:
                    continue  # left already
                by_loop[stream.loop].append((stream.queue, event))
                if event.finish_reason is not None:
                    del self._streams[event.id]
        for loop, news in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed without waiting for its answers
                loop.call_soon_threadsafe(_put_all, news)

    def _check_deadlines(self) -> None:
        waited = time.monotonic() - self._last_sign
        if self.ready is None and waited > self.config.load_timeout_s:
            self._give_up(
                EngineError(
                    f"start-up made no progress for {waited:.0f} s in stage {self.stage.name!r}; "
                    "raise load_timeout_s if the disk is slow"
                )
            )
        elif self.is_overdue:
            self._give_up(EngineError(f"the engine took more than step_timeout_s={self.config.step_timeout_s:g} s for one step"))

    def _give_up(self, error: VLServeError) -> None:
        first = self.error is None
        with self._lock:
            if first:
                self.error = error
            open_streams = list(self._streams)
        self._dispatch([TokenEvent(id=id, token_id=None, finish_reason="error", error=str(error)) for id in open_streams])
        self._settled.set()
        if first:
            self.on_failure(error)

    def _end_rank(self, process: subprocess.Popen[bytes], requests: zmq.Socket[bytes]) -> None:
        if process.poll() is None and self.ready is not None:
            with contextlib.suppress(zmq.ZMQError):
                requests.send(self._encoder.encode(Shutdown()), zmq.NOBLOCK)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _put_all(news: list[tuple[asyncio.Queue[TokenEvent], TokenEvent]]) -> None:
    for queue, event in news:
        queue.put_nowait(event)


def _salted(digest: bytes, salt: str) -> bytes:
    """A picture's name in the caches, different for every salt."""
    return hashlib.blake2b(digest + salt.encode(), digest_size=len(digest)).digest() if salt else digest


def _describe_exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"
