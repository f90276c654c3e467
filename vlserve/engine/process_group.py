"""The ranks of one model as torch.distributed sees them: how they meet, and what they say to one another.

Process groups are made and passed on, never registered globally, so several engines live in one process. Gloo carries what is on
the host (and everything on the CPU), NCCL what is on CUDA devices. Every collective is counted, timed, and noted in a file,
so that a rank that stands still can be named. Shapes: R rows, V columns.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from vlserve.engine.one_shot_all_reduce import OneShot, can_meet
from vlserve.engine.rank_status import RankStatusWriter
from vlserve.errors import EngineError
from vlserve.llm.tensor_parallel import Group

log = logging.getLogger(__name__)
BATCH_BYTES = 8192  # of the one message that begins a step; a longer one takes a second


class CollectiveError(EngineError):
    """Another rank did not take part: it is gone, or it took too long."""


@dataclass(slots=True)
class Traffic:
    """Of one kind of collective since the start, on this rank."""

    count: int = 0
    num_bytes: int = 0  # handed in by this rank


class DistributedGroup(Group):
    """Ranks that share a model. Every rank calls the same methods in the same order; a rank that fails leaves them for good."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, *, address: str, timeout_s: float, status: RankStatusWriter
    ) -> None:
        self.rank, self.size = rank, size
        self.traffic: dict[str, Traffic] = {}
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._is_recording = False
        self._status, self._store, self._timeout = status, store, timedelta(seconds=timeout_s)
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        options._timeout = self._timeout
        with self._noted("connecting", None):
            self._host = dist.ProcessGroupGloo(dist.PrefixStore("host", store), rank, size, options)
        self._device: dist.ProcessGroup = self._host
        self._one_shot: OneShot | None = None

    def use_cuda(self, device: torch.device) -> None:
        """From here on, tensors on the device go over NCCL."""
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        self._device = dist.ProcessGroupNCCL(dist.PrefixStore("device", self._store), self.rank, self.size, options)

    def use_one_shot(self, device: torch.device, num_local: int) -> None:
        """From here on, small all-reduces on the device are one kernel, if that works on every rank.

        Args:
            num_local: ranks on this machine.
        """
        made, failure = None, ""
        if self.minimum(can_meet(device, self.size, num_local), "one-shot vote") == 0:
            return
        try:
            made = OneShot(self._store, self.rank, self.size, device, self._timeout)
        except RuntimeError as error:
            failure = _shorten(error)
        if self.minimum(not failure, "one-shot vote") and made is not None:
            failure = self._try_one_shot(made, device)
            if self.minimum(not failure, "one-shot vote"):
                self._one_shot = made
                return
        reason = failure or "another rank could not"
        log.warning("small all-reduces go over NCCL, since torch's symmetric memory does not work here: %s", reason)

    def _try_one_shot(self, one_shot: OneShot, device: torch.device) -> str:
        """Why it is not used; nothing where its first sum is right."""
        x = torch.full((1024,), float(self.rank + 1), device=device)
        try:
            one_shot.all_reduce(x)
            return "" if bool((x == sum(range(1, self.size + 1))).all()) else "the first sum was wrong"
        except RuntimeError as error:
            return _shorten(error)

    @property
    def can_record(self) -> bool:
        """Whether collectives on the device may be part of a CUDA graph: NCCL's may, Gloo's never."""
        return self._device is not self._host

    @contextlib.contextmanager
    def recording(self) -> Iterator[dict[str, Traffic]]:
        """Collectives on the device become part of a graph: they are not timed, and what they will move is given, not counted."""
        kept, self.traffic = self.traffic, {}
        self._is_recording = True
        try:
            yield self.traffic
        finally:
            self.traffic, self._is_recording = kept, False

    def count(self, traffic: dict[str, Traffic]) -> None:
        """A graph with these collectives was replayed."""
        for kind, more in traffic.items():
            self._count(kind, more)

    def check(self, device: torch.device) -> None:
        """One all-reduce on the host and one on the device, with the result compared; raises EngineError."""
        expected = float(sum(range(1, self.size + 1)))
        for where in (torch.device("cpu"), device):
            found = self.all_reduce(torch.full((1024,), float(self.rank + 1), device=where), "check")
            if not bool((found == expected).all()):
                raise EngineError(
                    f"rank {self.rank}: the first all-reduce on {where} gave {float(found[0])}, not {expected}; "
                    "this is a fault of the driver or of NCCL. Try NCCL_P2P_DISABLE=1, and look at the ACS setting of the BIOS"
                )

    def all_reduce(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        options = dist.AllreduceOptions()
        if hasattr(options, "asyncOp"):  # NCCL then takes the stream that computes, not one of its own that waits for it
            options.asyncOp = False
        with self._noted(kind, x) as group:
            if self._one_shot is not None and self._one_shot.takes(x):
                self._one_shot.all_reduce(x)
            else:
                work = group.allreduce([x], options)
                if work is not None:  # on that stream there is nothing to wait for, and since torch 2.8 NCCL gives nothing
                    work.wait()
        return x

    def minimum(self, value: int, kind: str) -> int:
        """The smallest of all ranks' values."""
        x = torch.tensor([value])
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        with self._noted(kind, x) as group:
            group.allreduce([x], options).wait()
        return int(x[0])

    def gather(self, x: torch.Tensor, kind: str) -> torch.Tensor | None:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        with self._noted(kind, x) as group:
            group.gather([parts] if parts else [], [x], options).wait()
        return torch.cat(parts, dim=-1) if parts else None

    def all_gather(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        out = x.new_empty((self.size, *x.shape))
        with self._noted(kind, x) as group:
            group._allgather_base(out.view(-1), x.contiguous().view(-1)).wait()  # NCCL's `allgather` has a copy of it all
        return out

    def broadcast(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        with self._noted(kind, x) as group:
            group.broadcast([x], dist.BroadcastOptions()).wait()
        return x

    def send(self, x: torch.Tensor, to: int, kind: str) -> None:
        with self._noted(kind, x) as group:
            group.send([x], to, 0).wait()

    def receive(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        """From rank 0, into x."""
        with self._noted(kind, x) as group:
            group.recv([x], 0, 0).wait()
        return x

    def broadcast_message(self, message: bytes) -> None:
        """To every other rank, which calls `receive_message`."""
        frame = torch.zeros(BATCH_BYTES, dtype=torch.uint8)
        content = torch.frombuffer(bytearray(len(message).to_bytes(8, "little") + message), dtype=torch.uint8)
        head, rest = content[:BATCH_BYTES], content[BATCH_BYTES:]
        frame[: len(head)] = head
        self.broadcast(frame, "batch")
        if len(rest):
            self.broadcast(rest, "batch_rest")

    def receive_message(self) -> bytes:
        frame = self.broadcast(torch.empty(BATCH_BYTES, dtype=torch.uint8), "batch").numpy().tobytes()
        length = int.from_bytes(frame[:8], "little")
        rest = torch.empty(max(0, 8 + length - BATCH_BYTES), dtype=torch.uint8)
        if len(rest):
            frame += self.broadcast(rest, "batch_rest").numpy().tobytes()
        return frame[8 : 8 + length]

    @contextlib.contextmanager
    def _noted(self, kind: str, x: torch.Tensor | None) -> Iterator[dist.ProcessGroup]:
        """Counts and times a collective, and says in the status file that this rank waits in it."""
        is_cuda = x is not None and x.is_cuda
        begun, events = time.perf_counter(), _events() if is_cuda and not self._is_recording else None
        self._status.enter(kind)
        try:
            yield self._device if is_cuda else getattr(self, "_host", None)  # none yet while it connects
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {self.rank} waited for the other ranks in {kind!r} in vain: {_shorten(error)}; the log of the rank that "
                "ended or hangs says more"
            ) from error
        self._status.leave()
        if events is not None:
            events[1].record()
            self._events.append(events)
            while self._events and self._events[0][1].query():  # on CUDA, those that have ended by now
                begin, end = self._events.popleft()
                self.seconds += begin.elapsed_time(end) / 1000
        elif not self._is_recording:
            self.seconds += time.perf_counter() - begun
        if x is not None:
            self._count(kind, Traffic(1, x.nbytes))

    def _count(self, kind: str, more: Traffic) -> None:
        traffic = self.traffic.setdefault(kind, Traffic())
        traffic.count += more.count
        traffic.num_bytes += more.num_bytes


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    return begin, end


def _shorten(error: RuntimeError) -> str:
    """Without the place in torch's sources, and without what Gloo says of every error."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S*\] ", "", line).partition(". This is typically")[0]


def local_address(endpoint: str | None) -> str:
    """The address at which ranks of other nodes reach this one; loopback while there is one node."""
    if endpoint is None:
        return "127.0.0.1"
    host, _, port = endpoint.rpartition(":")
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # of a datagram socket: picks a route and sends nothing
        return str(probe.getsockname()[0])
