"""NCCL, Gloo and symmetric memory for ranks that are threads of one process, each with a rehearsed device.

What NCCL refuses is refused, sums are computed, and each rank's collectives are written down. Ranks meet at every collective,
whatever carries it, in the one order that the engine promises: two that are in different ones are told so at once, where real
ranks would add up what does not belong together, or wait for one another until a deadline.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from tests.rehearsal.cuda import Rehearsal
from tests.rehearsal.device import DeviceError, DeviceTensor
from vlserve.config import EngineConfig
from vlserve.engine.engine import Seat
from vlserve.engine.process_group import DistributedGroup
from vlserve.engine.rank_status import RankStatusReader, RankStatusWriter
from vlserve.ranks.rank_process import RankArguments, _Rank

PATIENCE_S = 60.0  # for a rank that computes
NCCL, GLOO, ONE_SHOT = "nccl", "gloo", "symmetric memory"
LAUNCHED, RECORDED, REPLAYED = "launched", "recorded", "replayed"
_COMMON = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.int32,
    torch.int64,
}
# torch's ProcessGroupNCCL.cpp, `ncclDataType`, and GENERATE_ALL_TYPES of ProcessGroupGlooDetail.hpp; and the types of torch's
# CUDASymmetricMemoryOps.cu, AT_DISPATCH_FLOAT_AND_BFLOAT16
TYPES = {NCCL: _COMMON | {torch.float8_e4m3fn, torch.float8_e5m2}, GLOO: _COMMON, ONE_SHOT: {torch.float32, torch.bfloat16}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """`kind` is the engine's name for it; `number` counts the elements that a rank hands in; `how`: launched, or recorded in a
    graph, or replayed with one."""

    kind: str
    operation: str
    carrier: str
    dtype: torch.dtype
    number: int
    how: str

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.kind!r} ({self.operation} of {self.number} {name} over {self.carrier}, {self.how})"


class Meetings:
    """Where ranks meet: the n-th collective of each is the n-th of all."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.written: list[list[Collective]] = [[] for _ in range(size)]
        self.failure = ""
        self._changed = threading.Condition()
        self._places: dict[int, dict[int, tuple[Collective, Any]]] = {}
        self._next = [0] * size  # by rank

    def meet(self, rank: int, what: Collective, brought: Any) -> list[Any]:
        """What each rank brought. Raises DeviceError where one is in another collective, or ended, or does not come."""
        with self._changed:
            place = self._next[rank]
            self._next[rank] += 1
            self.written[rank].append(what)
            there = self._places.setdefault(place, {})
            there[rank] = what, brought
            for other, (theirs, _) in there.items():
                if theirs != what:
                    self._fail(f"rank {other} is in {theirs}, and rank {rank} in {what}, the collective {place} of both")
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self.failure or len(there) == self.size, PATIENCE_S):
                self._fail(f"rank {rank} waits in {what} for the others in vain")
            if self.failure:
                raise DeviceError(self.failure)
            self._places.pop(place, None)
            return [there[one][1] for one in range(self.size)]

    def end(self, reason: str) -> None:
        """A rank ended: nobody need wait for it."""
        with self._changed:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        self.failure = self.failure or reason
        self._changed.notify_all()


class Collectives:
    """Ranks that are threads; `seated` is for each one's. They have a device each, or one for all of them, which NCCL does not
    take: then everything goes over Gloo."""

    def __init__(self, cards: Rehearsal, folder: Path, size: int) -> None:
        self.cards, self.folder, self.meetings = cards, folder, Meetings(size)
        self.here = threading.local()  # this thread's rank, and the kind that it is in
        self.pixels: dict[tuple[int, int], deque[torch.Tensor]] = {}  # under way, by sender and receiver
        self.named: dict[tuple[str, int], dist.ProcessGroup] = {}  # torch's registry of the process, by name and rank
        self.symmetric: dict[int, str] = {}  # memory by storage
        self.met: set[int] = set()  # that of storages whose ranks have met
        RankStatusReader(folder / "rank_status", size)

    @property
    def written(self) -> list[list[Collective]]:
        """By rank, in order."""
        return self.meetings.written

    @contextlib.contextmanager
    def seated(self, config: EngineConfig, rank: int) -> Iterator[Seat]:
        """As `python -m vlserve.rank` sits down: the ranks meet, NCCL and symmetric memory are set up and tried."""
        self.here.rank, self.here.kind = rank, ""
        arguments = RankArguments(config=config, rank=rank, folder=str(self.folder), pixel_folders=[], parent=0)
        with self.cards.entered():
            try:
                yield _Rank(arguments, lambda message: None)._sit_down() if self.cards.count > 1 else self._beside_others(rank)
            except BaseException as error:
                self.meetings.end(f"rank {rank} ended: {error}")
                raise

    def _beside_others(self, rank: int) -> Seat:
        store = dist.PrefixStore("one device", dist.FileStore(str(self.folder / "store"), self.meetings.size))
        status = RankStatusWriter(self.folder / "rank_status", rank)
        return Seat(group=DistributedGroup(store, rank, self.meetings.size, address="127.0.0.1", timeout_s=60, status=status))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        enter = RankStatusWriter.enter

        def noted(writer: RankStatusWriter, kind: str) -> None:
            self.here.kind = kind
            enter(writer, kind)

        monkeypatch.setattr(RankStatusWriter, "enter", noted)
        real = dist.ProcessGroupGloo

        class Gloo(_Gloo):
            ranks, _Options, create_device = self, real._Options, real.create_device

        class Nccl(_Nccl):
            ranks = self

        monkeypatch.setattr(dist, "ProcessGroupGloo", Gloo)
        monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
        monkeypatch.setattr(c10d, "_register_process_group", self._register)
        monkeypatch.setattr(c10d, "_SymmetricMemory", self)
        self.cards.shared.operators["symm_mem::one_shot_all_reduce_copy_out"] = self.one_shot_all_reduce_copy_out

    def run(self, carrier: str, operation: str, x: torch.Tensor, take: Callable[[list[Any]], None]) -> None:
        """Meet the others with x: now, or whenever the graph that is recorded is replayed; `take` puts away what all brought."""
        graph, kind = self.cards.shared.graph, self.here.kind
        if x.dtype not in TYPES[carrier]:
            raise DeviceError(f"{carrier} has no {x.dtype}, which {kind!r} gives it")
        what = Collective(
            kind=kind,
            operation=operation,
            carrier=carrier,
            dtype=x.dtype,
            number=x.numel(),
            how=LAUNCHED if graph is None else RECORDED,
        )
        inner, rank = _inner(x), self.here.rank

        def do(what: Collective) -> None:
            with torch.inference_mode():
                take(self.meetings.meet(rank, what, inner.clone()))

        if graph is None:
            do(what)
            return
        self.written[rank].append(what)
        graph.add(self.cards.shared, lambda: do(replace(what, how=REPLAYED)), str(what), x)

    # torch's symmetric memory

    def _register(self, name: str, group: dist.ProcessGroup) -> None:
        self.named[name, group.rank()] = group

    def empty_strided_p2p(
        self, size: Any, stride: Any, dtype: torch.dtype, device: torch.device, name: str | None = None
    ) -> torch.Tensor:
        made = self.cards.shared.wrap(torch.empty_strided(size, stride, dtype=dtype).zero_(), device, is_counted=False)
        self.symmetric[_storage(made)] = name or ""
        return made

    def set_group_info(self, name: str, rank: int, size: int, store: dist.Store) -> None:
        pass

    def rendezvous(self, buffer: torch.Tensor, name: str | None = None) -> object:
        """All ranks of the group tell one another where their memory is."""
        if self.symmetric.get(_storage(buffer)) != name or (name, self.here.rank) not in self.named:
            raise RuntimeError(f"no memory of empty_strided_p2p, or no group, of the name {name!r}")
        what = Collective(
            kind=self.here.kind,
            operation="rendezvous",
            carrier=ONE_SHOT,
            dtype=buffer.dtype,
            number=buffer.numel(),
            how=LAUNCHED,
        )
        self.meetings.meet(self.here.rank, what, None)
        self.met.add(_storage(buffer))
        return object()

    def one_shot_all_reduce_copy_out(
        self, symm_buffer: torch.Tensor, local_input: torch.Tensor, reduce_op: str, group_name: str, out: torch.Tensor
    ) -> torch.Tensor:
        """What CUDASymmetricMemoryOps.cu checks, and its sum: every rank's numbers, in the order of the ranks."""
        if not all(isinstance(one, DeviceTensor) and one.is_contiguous() for one in (symm_buffer, local_input, out)):
            raise DeviceError("one_shot_all_reduce takes contiguous tensors of the device")
        if len({one.device for one in (symm_buffer, local_input, out)}) > 1:
            raise DeviceError(f"one_shot_all_reduce has operands on {symm_buffer.device}, {local_input.device} and {out.device}")
        if out.shape != symm_buffer.shape or local_input.numel() > symm_buffer.numel() or reduce_op != "sum":
            raise DeviceError("one_shot_all_reduce: input, output or operation do not fit")
        if _storage(symm_buffer) not in self.met:
            raise DeviceError("one_shot_all_reduce: the buffer is not of empty_strided_p2p, or the ranks have not met over it")
        if _alignment(symm_buffer) != _alignment(local_input):
            raise DeviceError("one_shot_all_reduce: local input and buffer must have the same alignment")
        to = _inner(out)
        self.run(ONE_SHOT, "all_reduce", local_input, lambda parts: to.copy_(_sum(parts)))
        return out


class _Work:
    """The host goes on: work on a device is waited for by its stream, and the host's is done."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class _Carrier:
    """What process groups have in common."""

    ranks: Collectives
    carrier: str

    def __init__(self, store: dist.Store, rank: int, size: int, options: Any) -> None:
        self.rank, self.size = rank, size

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> _Work | None:
        x = self._taken(tensors)
        is_least = options.reduceOp == dist.ReduceOp.MIN
        to = _inner(x)
        self.ranks.run(
            self.carrier, "all_reduce", x, lambda parts: to.copy_(torch.stack(parts).amin(0) if is_least else _sum(parts))
        )
        return self._work(options)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> _Work | None:
        x = self._taken(tensors)
        to, root = _inner(x), options.rootRank
        self.ranks.run(self.carrier, "broadcast", x, lambda parts: to.copy_(parts[root]))
        return self._work(options)

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], options: Any) -> _Work | None:
        x = self._taken(inputs)
        if (self.rank == options.rootRank) != bool(outputs):
            raise DeviceError(f"{self.carrier}'s gather takes outputs on its root and none elsewhere")
        self._gathered("gather", outputs, x)
        return self._work(options)

    def _allgather_base(self, output: torch.Tensor, given: torch.Tensor, options: Any = None) -> _Work | None:
        x = self._taken([given])
        if (output.dtype, output.device, output.numel()) != (x.dtype, x.device, self.size * x.numel()) or x.ndim != 1:
            raise DeviceError(f"{self.carrier}'s all_gather takes one flat output of {self.size} times the input")
        to = _inner(output)
        self.ranks.run(self.carrier, "all_gather", x, lambda parts: to.copy_(torch.cat(parts)))
        return self._work(options)

    def _gathered(self, operation: str, outputs: list[list[torch.Tensor]], x: torch.Tensor) -> None:
        for row in outputs:
            if len(row) != self.size or any((one.shape, one.dtype, one.device) != (x.shape, x.dtype, x.device) for one in row):
                raise DeviceError(f"{self.carrier}'s {operation} takes {self.size} outputs like the input")
        to = [_inner(one) for row in outputs for one in row]

        def take(parts: list[torch.Tensor]) -> None:
            for one, part in zip(to, parts, strict=False):
                one.copy_(part)

        self.ranks.run(self.carrier, operation, x, take)

    def _taken(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def _work(self, options: Any) -> _Work | None:
        return _Work()


class _Nccl(_Carrier):
    """torch's ProcessGroupNCCL: tensors of its one device, contiguous; its first collective makes the communicator."""

    carrier = NCCL

    class Options:
        _timeout: Any = None

    def __init__(self, store: dist.Store, rank: int, size: int, options: Any) -> None:
        super().__init__(store, rank, size, options)
        self._device: torch.device | None = None

    def _taken(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        (x,) = tensors
        kind = self.ranks.here.kind
        if not isinstance(x, DeviceTensor):
            raise DeviceError(f"NCCL is given a tensor of the host in {kind!r}")
        if not x.is_contiguous():
            raise DeviceError(f"NCCL is given a tensor that is not contiguous in {kind!r}")
        if self._device is None:
            if self.ranks.cards.shared.graph is not None:
                raise DeviceError(f"NCCL's communicator would be made while a graph is recorded, in {kind!r}")
            if x.device.index != self.ranks.cards.shared.current:
                raise DeviceError(f"NCCL is given a tensor on {x.device} by a rank whose device is not that, in {kind!r}")
            self._device = x.device
        if x.device != self._device:
            raise DeviceError(f"NCCL is given a tensor on {x.device} by the rank of {self._device} in {kind!r}")
        return x

    def _work(self, options: Any) -> _Work | None:
        """None where it takes the stream that computes, since torch 2.8: `collective` ends with `asyncOp ? work : nullptr`."""
        return _Work() if getattr(options, "asyncOp", True) else None


class _Gloo(_Carrier):
    """Over the host. A device's tensors are copied there and back, which waits, and which no graph can hold."""

    carrier = GLOO

    def _taken(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        (x,) = tensors
        if self.ranks.cards.shared.graph is not None:
            raise DeviceError(f"{self.ranks.here.kind!r} goes over the host while a graph is recorded")
        if not x.is_contiguous():
            raise DeviceError(f"Gloo is given a tensor that is not contiguous in {self.ranks.here.kind!r}")
        if x.is_cuda:
            self.ranks.cards.shared.wait(f"Gloo's {self.ranks.here.kind!r}")
        return x

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> _Work:
        self._way(self.rank, to).append(self._taken(tensors).clone())
        return _Work()

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> _Work:
        x, way = self._taken(tensors), self._way(source, self.rank)
        while not way and not self.ranks.meetings.failure:
            threading.Event().wait(0.001)
        if self.ranks.meetings.failure:
            raise DeviceError(self.ranks.meetings.failure)
        given = way.popleft()
        if (given.dtype, given.numel()) != (x.dtype, x.numel()):
            raise DeviceError(
                f"rank {source} sends {given.numel()} {given.dtype}, and rank {self.rank} takes {x.numel()} {x.dtype}"
            )
        x.copy_(given.view(x.shape))
        return _Work()

    def _way(self, source: int, to: int) -> deque[torch.Tensor]:
        return self.ranks.pixels.setdefault((source, to), deque())


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _least(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts).amin(0)


def _alignment(x: torch.Tensor) -> int:
    """Bytes that a thread loads at once: 16, 8 or 4."""
    start, size = int(x.storage_offset()) * x.itemsize, x.nbytes
    return next(number for number in (16, 8, 4, 2) if start % number == 0 and size % number == 0)


def _storage(x: torch.Tensor) -> int:
    return _inner(x).untyped_storage()._cdata


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x.inner if isinstance(x, DeviceTensor) else x
