"""Keeps the ranks of this machine running: starts them, watches them, ends them all when one fails, perhaps starts them again.

One thread owns the processes and the sockets. What is said to the ranks and done with their events is the subclass's business
(client.py); on machines without an HTTP server nothing is (worker_node.py).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import zmq

from vlserve import errors
from vlserve.config import EngineConfig
from vlserve.engine.messages import (
    Abort,
    Add,
    Failed,
    FromRank,
    Memory,
    Ready,
    Shutdown,
    Stage,
    Stats,
    Step,
    TokenEvent,
)
from vlserve.errors import ConfigError, EngineError, VLServeError
from vlserve.ranks.launch import Ranks
from vlserve.ranks.private_folders import PrivateFolder
from vlserve.system_limits import describe

log = logging.getLogger(__name__)
POLL_MS = 200  # how soon a dead rank is noticed
ECHO_S = 2.0  # so long a rank that only lost its peers waits for the one that knows why
MAX_RESTARTS, RESTARTS_WITHIN_S = 3, 600.0
MAX_FOLDER_BYTES = 91 if sys.platform == "linux" else 87  # a socket's path has 107 or 103; the name in the folder takes 16


class Supervisor:
    """`ready` is set while the ranks serve; `error` once they never will (again). Nothing runs before `start`."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.stage = Stage(name="starting")  # of the slowest rank
        self.ready: Ready | None = None
        self.error: VLServeError | None = None
        self.stats: Stats | None = None  # the latest
        self.num_restarts = 0
        self.ended_in_order = False  # on another machine than 0, which ended
        self.on_failure: Callable[[VLServeError], None] = lambda error: None
        self._ready_ranks: dict[int, Ready] = {}
        self._memory: dict[int, dict[str, int]] = {}  # bytes by kind of each rank but 0
        self._failure: VLServeError | None = None  # of the ranks that run now
        self._echo: tuple[float, VLServeError] | None = None
        self._restarted: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._ranks: Ranks | None = None
        self._lock = threading.Lock()
        self._settled = threading.Event()  # ready or failed
        self._closing = threading.Event()
        self._last_sign = time.monotonic()
        self._is_owed = False  # the ranks have a request, or a message that they have not read yet
        self._num_told = 0  # messages to the ranks that run now
        self._encoder = msgspec.msgpack.Encoder()
        self._folder = PrivateFolder(Path(tempfile.gettempdir()))
        if len(os.fsencode(self._folder.path)) > MAX_FOLDER_BYTES:
            self._folder.close()
            raise ConfigError(
                f"the temporary folder {tempfile.gettempdir()} has too long a name for sockets; set TMPDIR to a shorter one"
            )
        self._context = zmq.Context()
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._outbox.bind("inproc://outbox")
        self._thread = threading.Thread(target=self._run, name="vlserve-ranks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_ready(self, on_stage: Callable[[Stage], None] = lambda stage: None) -> Ready:
        """Block until the rank serves; raises what it failed with."""
        shown = None
        while True:
            settled = self._settled.wait(0.05)
            error, ready = self.error, self.ready
            if error is not None:
                raise error
            if settled and ready is not None:
                return ready
            if self.stage is not shown:
                shown = self.stage
                on_stage(shown)

    @property
    def rank_stages(self) -> list[tuple[Stage, float]]:
        """Where each rank of this machine is, and for how many seconds."""
        ranks = self._ranks
        if ranks is None:
            return []
        now = time.monotonic()
        return [(stage, now - ranks.since[rank]) for rank, stage in sorted(ranks.stages.items())]

    @property
    def ready_ranks(self) -> dict[int, Ready]:
        """What each rank of this machine said when it was ready."""
        return dict(self._ready_ranks)

    @property
    def is_overdue(self) -> bool:
        """A step has been running for longer than it may."""
        waits = self.ready is not None and self._is_owed
        return waits and time.monotonic() - self._last_sign > self.config.step_timeout_s

    def close(self) -> None:
        """End the ranks and free everything; safe to call twice, and from any thread."""
        if self._closing.is_set():
            return
        self._give_up(EngineError("the engine was closed"))
        self._closing.set()
        self._thread.join(timeout=10)

    # what the subclass has to say, all called in the thread

    def _pixel_folders(self) -> Sequence[Path]:
        """Where ranks find the units of pictures."""
        return []

    def _open_requests(self) -> Iterable[Add]:
        """What the ranks are to compute, or to compute again after a restart; called with the lock held."""
        return ()

    def _dispatch(self, events: Sequence[TokenEvent]) -> None:
        """News of requests."""

    def _end_begun(self, message: str) -> None:
        """The ranks are gone and will be started again: end the requests that cannot be computed again."""

    def _end_all(self, message: str) -> None:
        """There will be no ranks any more: end every request."""

    def _free(self) -> None:
        """The ranks have ended for good."""

    def _tell(self, message: Add | Abort) -> None:
        """Send to rank 0; call with the lock held. The watch on a step begins with the first message that it has not answered:
        requests whose clients left do not hide that the ranks hang."""
        frame = self._encoder.encode(message)  # first: what cannot be encoded is owed no answer
        if not self._is_owed:
            self._is_owed, self._last_sign = True, time.monotonic()
        self._num_told += 1
        self._outbox.send(frame)

    def _run(self) -> None:
        """The thread: starts the ranks, moves messages until they end, perhaps starts them again."""
        inbox = self._context.socket(zmq.PULL)
        try:
            inbox.set_hwm(0)
            inbox.connect("inproc://outbox")
            for number in itertools.count():
                failure = self._run_ranks(self._folder.path / f"run-{number}", inbox)
                if failure is None or not self._may_restart():
                    break
                self._prepare_restart(failure)
            if failure is not None:
                again = (
                    f"; they were started again {self.num_restarts} time(s), and are not once more" if self.num_restarts else ""
                )
                self._give_up(type(failure)(f"{failure}{again}"))
        except Exception as error:
            log.exception("the thread that watches the ranks failed")
            self._give_up(EngineError(f"the engine cannot be reached: {describe(error)}"))
        finally:
            self._context.destroy(linger=0)
            self._free()
            self._folder.close()

    def _run_ranks(self, folder: Path, inbox: zmq.Socket[bytes]) -> VLServeError | None:
        """From the start of the ranks to their end; returns why they failed, or None when they were told to end."""
        folder.mkdir()
        requests, events = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        self._failure = self._echo = None
        self._last_sign = time.monotonic()
        try:
            for socket in (requests, events):
                socket.set_hwm(0)
            requests.connect(f"ipc://{folder}/requests")  # rank 0 binds it: what is sent before it does so waits, and is not lost
            events.bind(f"ipc://{folder}/events")
            self._ranks = Ranks(self.config, folder, self._pixel_folders())
            self._move_messages(self._ranks, inbox, requests, events)
        finally:
            if self._ranks is not None:
                told = self._failure is None and self.ready is not None and self.config.node_rank == 0
                if told:
                    with contextlib.suppress(zmq.ZMQError):
                        requests.send(self._encoder.encode(Shutdown()), zmq.NOBLOCK)
                self._ranks.end(wait_s=1 if told else 0)
            requests.close(linger=0)
            events.close(linger=0)
            shutil.rmtree(folder, ignore_errors=True)
        return self._failure

    def _move_messages(
        self, ranks: Ranks, inbox: zmq.Socket[bytes], requests: zmq.Socket[bytes], events: zmq.Socket[bytes]
    ) -> None:
        decoder = msgspec.msgpack.Decoder(FromRank)
        poller = zmq.Poller()
        poller.register(inbox, zmq.POLLIN)
        poller.register(events, zmq.POLLIN)
        looked = 0.0
        while self.error is None and self._failure is None:
            readable = dict(poller.poll(POLL_MS))
            if inbox in readable:
                message = inbox.recv()
                if self.ready is not None:
                    requests.send(message)  # never blocks: it has a queue without limit from the start
            if events in readable:
                self._handle(decoder.decode(events.recv()), ranks, inbox, requests)
                if time.monotonic() - looked < POLL_MS / 1000:
                    continue
            looked = time.monotonic()
            self._look_for_dead(ranks)
            self._check_deadlines(ranks)

    def _look_for_dead(self, ranks: Ranks) -> None:
        """A rank that was killed says all; for one that left by itself, the reason is on its way, from it or from the rank that
        it lost."""
        if self._failure is not None:
            return
        killed, left = ranks.find_dead()
        if killed is not None:
            self._failure = EngineError(killed)
        elif ranks.have_ended() and self.config.node_rank > 0:
            self.ended_in_order = True
            self._give_up(EngineError("machine 0 has ended"))
        elif left is not None and self._echo is None:
            self._echo = (time.monotonic() + ECHO_S, EngineError(left))
        elif self._echo is not None and time.monotonic() > self._echo[0]:
            self._failure = self._echo[1]

    def _handle(self, message: FromRank, ranks: Ranks, inbox: zmq.Socket[bytes], requests: zmq.Socket[bytes]) -> None:
        self._last_sign = time.monotonic()
        if isinstance(message, Step):
            stats = message.stats
            if self._memory:
                others = [self._memory[rank] for rank in sorted(self._memory)]
                stats = msgspec.structs.replace(stats, device_bytes=[*stats.device_bytes, *others])
            self.stats = stats
            self._dispatch(message.events)
            with self._lock:
                # news that was on its way when a client left does not answer that it left
                self._is_owed = message.num_taken < self._num_told or any(True for _ in self._open_requests())
        elif isinstance(message, Stage):
            before = ranks.stages[message.rank].name
            seconds = ranks.saw(message)
            self.stage = ranks.slowest
            if seconds is not None:
                log.info("rank %d: %s took %.1f s", message.rank, before, seconds)
        elif isinstance(message, Memory):
            self._memory[message.rank] = message.device_bytes
        elif isinstance(message, Ready):
            self._ready_ranks[message.rank] = message
            if message.rank != 0:
                self._memory[message.rank] = message.device_bytes
            if len(self._ready_ranks) == len(ranks.numbers):
                self._begin(self._ready_ranks[ranks.first], inbox, requests)
        elif isinstance(message, Failed):
            kind = getattr(errors, message.kind, EngineError)
            if message.is_echo:
                until = self._echo[0] if self._echo is not None else time.monotonic() + ECHO_S
                self._echo = (until, kind(message.message))  # says more than that a process ended
            else:
                self._failure = kind(message.message)

    def _begin(self, ready: Ready, inbox: zmq.Socket[bytes], requests: zmq.Socket[bytes]) -> None:
        """The ranks serve; open requests go to them, those too that were open when earlier ranks failed."""
        with self._lock:
            with contextlib.suppress(zmq.Again):  # what was told before is told again below, or is about requests that are gone
                while True:
                    inbox.recv(zmq.NOBLOCK)
            self._num_told = 0
            for request in self._open_requests():
                requests.send(self._encoder.encode(request))
                self._num_told += 1
            self._is_owed = self._num_told > 0
            self.ready = ready
        self._settled.set()

    def _may_restart(self) -> bool:
        """Only ranks that have served before, and not again and again."""
        if self.config.on_rank_failure != "restart" or self.ready is None or self.error is not None:
            return False
        full = len(self._restarted) == MAX_RESTARTS
        return not (full and time.monotonic() - self._restarted[0] < RESTARTS_WITHIN_S)

    def _prepare_restart(self, failure: VLServeError) -> None:
        log.error("%s; starting the ranks again", failure)
        self._restarted.append(time.monotonic())
        self.num_restarts += 1
        self._settled.clear()
        with self._lock:
            self.ready, self.stage = None, Stage(name="starting")
        self._ready_ranks, self._memory = {}, {}
        self._end_begun(str(failure))

    def _check_deadlines(self, ranks: Ranks) -> None:
        if self._failure is not None:
            return
        waited = time.monotonic() - self._last_sign
        if self.ready is None:
            stage = ranks.slowest.name
            name = "rendezvous_timeout_s" if stage in ("rendezvous", "all-reduce") else "load_timeout_s"
            limit = getattr(self.config, name) + (5 if stage == "rendezvous" else 0)  # there the ranks themselves know best
            if waited > limit:
                also = f", and see that machine 0 is what answers at {self.config.rdzv_endpoint}"
                self._failure = EngineError(
                    f"start-up made no progress for {waited:.0f} s in stage {stage!r}: {ranks.explain_stall()}. "
                    f"Raise {name} if this machine is slow{also if stage == 'rendezvous' and self.config.nnodes > 1 else ''}"
                )
        elif self.is_overdue:
            self._failure = EngineError(
                f"the engine took more than step_timeout_s={self.config.step_timeout_s:g} s for one step: "
                f"{ranks.explain_stall()}. Raise step_timeout_s if steps may take that long here"
            )

    def _give_up(self, error: VLServeError) -> None:
        with self._lock:
            first = self.error is None
            if first:
                self.error = error
        self._end_all(str(error))
        self._settled.set()
        if first:
            self.on_failure(error)
