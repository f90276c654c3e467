"""What a rank runs: `python -m vlserve.rank`, started by the front with its configuration on standard input.

Rank 0 reads requests from one socket; every rank writes events to another, both `ipc://` in a private folder. A rank
ends when it is told to, when the front's end of standard input closes, or when its parent is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import msgspec
import zmq

from vlserve.config import EngineConfig
from vlserve.engine.messages import (
    Abort,
    Add,
    Failed,
    FromRank,
    Memory,
    Preflight,
    Ready,
    Shutdown,
    Stage,
    Step,
    Task,
    TokenEvent,
    ToRank,
)
from vlserve.errors import VLServeError
from vlserve.system_limits import describe, raise_open_files

if TYPE_CHECKING:
    from vlserve.engine.engine import Engine, Seat
    from vlserve.engine.runner import Runner

TICK_S = 5.0  # while idle, how often rank 0 tells the others that it lives


class RankArguments(msgspec.Struct, frozen=True):
    """The one line of JSON on standard input."""

    config: EngineConfig
    rank: int
    folder: str  # private, of this run: sockets, the store, the status file
    pixel_folders: list[str]
    parent: int  # process id
    task: Task = "serve"

    @property
    def local_rank(self) -> int:
        return self.rank % self.config.ranks_per_node


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the front decides
        signal.signal(number, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line:  # the front is gone already
        os._exit(1)
    arguments = msgspec.json.decode(line, type=RankArguments)
    raise_open_files()
    _end_with_parent(arguments.parent)
    context = zmq.Context()
    events = context.socket(zmq.PUSH)
    events.set_hwm(0)
    events.connect(f"ipc://{arguments.folder}/events")
    events.setsockopt(zmq.LINGER, 1000)
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromRank) -> None:
        events.send(encoder.encode(message))

    rank = _Rank(arguments, send)
    try:
        rank.run(context)
    except Exception as error:  # noqa: BLE001  (whatever it is, the front must hear of it)
        send(rank.explain(error))
        _exit(context, 1)
    _exit(context, 0)


class _Rank:
    def __init__(self, arguments: RankArguments, send: _Send) -> None:
        self._arguments, self._config, self._send = arguments, arguments.config, send
        self._stage = "starting"
        self._tell_others: _Tell | None = None  # while they wait for this rank in the rendezvous

    def run(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._enter("imports")
        rank, requests = self._arguments.rank, context.socket(zmq.PULL)
        requests.set_hwm(0)
        if rank == 0:
            requests.bind(f"ipc://{self._arguments.folder}/requests")
        import torch

        from vlserve.engine.engine import Engine, build_runner

        config = self._config
        if config.threads is not None or config.tp > 1:
            torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // config.ranks_per_node))
        seat = self._sit_down()
        if self._arguments.task == "preflight":
            self._try_out(seat)
            return
        if rank == 0:
            engine = Engine(config, self._enter, seat=seat)
            self._send(Step(events=[], stats=engine.stats(), num_taken=0))  # before Ready: whoever sees it ready has figures
            self._ready(engine.runner)
            self._serve(engine, requests)
            engine.runner.idle(is_last=True)
            return
        from vlserve.models.checkpoint import find_checkpoint

        runner = build_runner(find_checkpoint(config), config, seat, self._enter)
        self._ready(runner)
        self._follow(runner)

    def explain(self, error: Exception) -> Failed:
        """What the front is told; a surprise leaves its traceback on standard error."""
        if isinstance(error, VLServeError):
            kind, message = type(error).__name__, str(error)
        else:
            traceback.print_exception(error)
            kind, message = "EngineError", f"the engine failed: {type(error).__name__}: {describe(error)}"
            text = str(error).lower()
            if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
                message = (
                    "out of memory; try a smaller kv_cache_gib (--kv-cache-gib) or max_model_len (--max-model-len), a 16-bit "
                    "dtype (--dtype) or a larger tp (--tp)"
                )
        is_echo = kind == "CollectiveError"
        if self._config.tp > 1 and not is_echo and (kind == "EngineError" or not isinstance(error, VLServeError)):
            where = "in a step" if self._stage == "ready" else f"stage {self._stage!r}"
            message = f"rank {self._arguments.rank}, {where}: {message}"
        if self._tell_others is not None and not is_echo:
            with contextlib.suppress(RuntimeError):  # their store may be gone
                self._tell_others(message)
        return Failed(kind="EngineError" if is_echo else kind, message=message, rank=self._arguments.rank, is_echo=is_echo)

    def _enter(self, name: str, done: int = 0, total: int = 0) -> None:
        self._stage = name
        self._send(Stage(name=name, done=done, total=total, rank=self._arguments.rank))

    def _sit_down(self) -> Seat:
        """Meet the other ranks and see that they can be reached."""
        from vlserve.engine.engine import Seat
        from vlserve.engine.pixel_store import PixelStore

        arguments, config = self._arguments, self._config
        pixels = PixelStore([Path(folder) for folder in arguments.pixel_folders])
        if config.tp == 1:
            return Seat(pixels=pixels)
        from vlserve.engine.loading import resolve_device
        from vlserve.engine.process_group import DistributedGroup, local_address
        from vlserve.engine.rank_status import RankStatusWriter
        from vlserve.engine.rendezvous import meet, open_store, report_failure

        device = resolve_device(config, arguments.local_rank)
        self._enter("rendezvous")
        store = open_store(config, Path(arguments.folder), arguments.rank)
        is_last = config.nnodes > 1 and arguments.rank == 0
        self._tell_others = lambda message: report_failure(store, message, is_last=is_last)
        meet(store, config, arguments.rank)
        self._tell_others = None
        group = DistributedGroup(
            *(store, arguments.rank, config.tp),
            address=local_address(config.rdzv_endpoint if config.nnodes > 1 else None),
            timeout_s=max(config.load_timeout_s, config.step_timeout_s) + 30,  # the front's deadlines come first
            status=RankStatusWriter(Path(arguments.folder) / "rank_status", arguments.local_rank),
        )
        self._enter("all-reduce")
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)
            group.use_cuda(device)
        group.check(device)
        group.use_one_shot(device, config.ranks_per_node)
        return Seat(group=group, local_rank=arguments.local_rank, pixels=pixels)

    def _try_out(self, seat: Seat) -> None:
        from vlserve.engine.loading import resolve_device
        from vlserve.engine.preflight import time_all_reduce, try_device

        device = resolve_device(self._config, self._arguments.local_rank)
        try_device(device)
        times = time_all_reduce(seat.group, device, lambda done, total: self._enter("all-reduce", done, total))
        self._send(Preflight(rank=self._arguments.rank, device=str(device), all_reduce=times))
        threading.Event().wait()  # the front ends all ranks; one that went by itself would look as if it had failed

    def _ready(self, runner: Runner) -> None:
        self._enter("ready")
        self._send(
            Ready(
                rank=self._arguments.rank,
                max_model_len=runner.max_model_len,
                num_blocks=runner.num_blocks,
                block_size=runner.block_size,
                vocab_size=runner.model.decoder.config.vocab_size,
                device=str(runner.device),
                dtype=str(runner.dtype).removeprefix("torch."),
                device_bytes=runner.device_bytes(),
            )
        )

    def _serve(self, engine: Engine, requests: zmq.Socket[bytes]) -> None:
        decoder = msgspec.msgpack.Decoder(ToRank)
        num_taken = 0
        while True:
            ended: list[TokenEvent] = []
            received = _receive(requests, wait_s=0.0 if engine.has_work else TICK_S)
            if not received and not engine.has_work:
                engine.runner.idle()
                continue
            num_taken += len(received)
            for frame in received:
                try:
                    message = decoder.decode(frame)
                    if isinstance(message, Shutdown):
                        return
                    if isinstance(message, Abort):
                        ended += engine.abort(message.ids)
                    elif isinstance(message, Add):
                        engine.add(message)
                except (msgspec.ValidationError, ValueError, OSError) as error:  # one request's, not the others'
                    id, reason = msgspec.msgpack.decode(frame)["id"], f"the request could not be taken: {describe(error)}"
                    ended.append(TokenEvent(id=id, token_id=None, finish_reason="error", error=reason))
            ended += engine.step()
            engine.runner.keep_alive(TICK_S)
            self._send(Step(events=ended, stats=engine.stats(), num_taken=num_taken))

    def _follow(self, runner: Runner) -> None:
        told, at = runner.device_bytes(), time.monotonic()
        while runner.follow():
            if time.monotonic() - at > TICK_S:
                known, told, at = told, runner.device_bytes(), time.monotonic()
                if told != known:
                    self._send(Memory(rank=self._arguments.rank, device_bytes=told))


def _exit(context: zmq.Context[zmq.Socket[bytes]], status: int) -> NoReturn:
    """Flush the sockets and go; an orderly interpreter shutdown with torch loaded takes a second."""
    context.destroy(linger=1000)
    sys.stderr.flush()
    os._exit(status)


def _receive(socket: zmq.Socket[bytes], *, wait_s: float) -> list[bytes]:
    """All messages that are there; waits so long for the first."""
    messages = []
    if wait_s == 0 or socket.poll(int(wait_s * 1000)):
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(socket.recv(zmq.NOBLOCK))
    return messages


def _end_with_parent(parent: int) -> None:
    """Two ways, since one may be blocked or missing: the kernel's (Linux), and end-of-file on standard input."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we asked
        os._exit(1)

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, name="vlserve-parent", daemon=True).start()


class _Send(Protocol):
    """The type of a function that sends one message."""

    def __call__(self, message: FromRank) -> None: ...


class _Tell(Protocol):
    def __call__(self, message: str) -> None: ...


if __name__ == "__main__":
    main()
