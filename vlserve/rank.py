"""What a rank runs: `python -m vlserve.rank`, started by the front with its configuration on standard input.

The rank reads requests from one socket and writes events to another, both `ipc://` in a private folder.
It ends when it is told to, when the front's end of standard input closes, or when its parent is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from typing import NoReturn, Protocol

import msgspec
import zmq

from vlserve.config import EngineConfig
from vlserve.engine.messages import Abort, Add, Failed, FromRank, Ready, Shutdown, Stage, Step, TokenEvent, ToRank
from vlserve.errors import VLServeError


class RankArguments(msgspec.Struct, frozen=True):
    """The one line of JSON on standard input."""

    config: EngineConfig
    requests: str  # ipc:// address to read from
    events: str  # ipc:// address to write to
    parent: int  # process id


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the front decides
        signal.signal(number, signal.SIG_IGN)
    arguments = msgspec.json.decode(sys.stdin.buffer.readline(), type=RankArguments)
    _end_with_parent(arguments.parent)
    context = zmq.Context()
    requests, events = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket, address in ((requests, arguments.requests), (events, arguments.events)):
        socket.set_hwm(0)
        socket.connect(address)
    events.setsockopt(zmq.LINGER, 1000)
    encoder = msgspec.msgpack.Encoder()

    def send(message: FromRank) -> None:
        events.send(encoder.encode(message))

    try:
        _serve(arguments.config, requests, send)
    except VLServeError as error:
        send(Failed(kind=type(error).__name__, message=str(error)))
        _exit(context, 1)
    except Exception as error:  # noqa: BLE001  (whatever it is, the front must hear of it)
        traceback.print_exc()
        message = f"the engine failed: {type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
            message = "out of memory; try a smaller kv_cache_gib, max_model_len or a 16-bit dtype"
        send(Failed(kind="EngineError", message=message))
        _exit(context, 1)
    _exit(context, 0)


def _exit(context: zmq.Context[zmq.Socket[bytes]], status: int) -> NoReturn:
    """Flush the sockets and go; an orderly interpreter shutdown with torch loaded takes a second."""
    context.destroy(linger=1000)
    sys.stderr.flush()
    os._exit(status)


def _serve(config: EngineConfig, requests: zmq.Socket[bytes], send: _Send) -> None:
    send(Stage(name="imports"))
    import torch

    from vlserve.engine.engine import Engine

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    engine = Engine(config, lambda name, done, total: send(Stage(name=name, done=done, total=total)))
    runner = engine.runner
    send(Step(events=[], stats=engine.stats()))  # before Ready: whoever sees it ready has figures
    send(
        Ready(
            max_model_len=runner.max_model_len,
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
            vocab_size=runner.model.decoder.config.vocab_size,
            device=str(runner.device),
            dtype=str(runner.dtype).removeprefix("torch."),
        )
    )
    decoder = msgspec.msgpack.Decoder(ToRank)

    def pixels(frame: zmq.Frame, num_tiles: int) -> torch.Tensor:
        size = runner.model.image_config.tile_size
        return torch.frombuffer(bytearray(frame.buffer), dtype=torch.uint8).view(num_tiles, 3, size, size)

    while True:
        ended: list[TokenEvent] = []
        for frames in _receive(requests, wait=not engine.has_work):
            message = decoder.decode(frames[0].buffer)
            if isinstance(message, Shutdown):
                return
            if isinstance(message, Abort):
                ended += engine.abort(message.ids)
            elif isinstance(message, Add):
                engine.add(message, [pixels(f, i.num_tiles) for f, i in zip(frames[1:], message.images, strict=True)])
        ended += engine.step()
        send(Step(events=ended, stats=engine.stats()))


def _receive(socket: zmq.Socket[bytes], *, wait: bool) -> list[list[zmq.Frame]]:
    """All messages that are there; with `wait`, at least one."""
    messages = [socket.recv_multipart(copy=False)] if wait else []
    with contextlib.suppress(zmq.Again):
        while True:
            messages.append(socket.recv_multipart(zmq.NOBLOCK, copy=False))
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


if __name__ == "__main__":
    main()
