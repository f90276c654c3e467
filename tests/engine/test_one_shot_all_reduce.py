"""Which all-reduces are one kernel, and what happens where that does not work. torch's own part of it needs several GPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from tests.engine.test_process_group import together
from vlserve.engine import one_shot_all_reduce as one_shot
from vlserve.engine import process_group as group_module
from vlserve.engine.one_shot_all_reduce import MOST_BYTES, OneShot, can_meet
from vlserve.engine.process_group import DistributedGroup, Traffic

CPU = torch.device("cpu")


class Fake:
    """Ranks that are threads: each puts what it has where all others find it, as the shared buffers are."""

    able: ClassVar[list[bool]]
    working: ClassVar[list[bool]]
    error = 0.0
    parts: ClassVar[dict[int, torch.Tensor]]
    barrier: ClassVar[threading.Barrier]
    used: ClassVar[list[int]]

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
        if not self.working[rank]:
            raise RuntimeError(f"[/src/x.cpp:1] rank {rank} has no peer memory")
        self._rank, self._buffer = rank, torch.empty(MOST_BYTES[size], dtype=torch.uint8)

    takes = OneShot.takes

    def all_reduce(self, x: torch.Tensor) -> None:
        self.parts[self._rank] = x.clone()
        self.barrier.wait(timeout=20)
        if self.error > 1:
            self.used.append(self._rank)
            raise RuntimeError("no kernel image is available")
        total = sum(part.float() for part in self.parts.values()) + self.error
        self.barrier.wait(timeout=20)
        x.copy_(total)
        self.used.append(self._rank)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fake]]:
    Fake.able, Fake.working, Fake.error = [True, True], [True, True], 0.0
    Fake.parts, Fake.barrier, Fake.used = {}, threading.Barrier(2), []
    ranks = threading.local()

    def meets(device: torch.device, size: int, num_local: int) -> bool:
        return Fake.able[ranks.rank] and size == num_local

    def use(group: DistributedGroup, num_local: int = 2) -> None:
        ranks.rank = group.rank
        group.use_one_shot(CPU, num_local)

    monkeypatch.setattr(group_module, "can_meet", meets)
    monkeypatch.setattr(group_module, "OneShot", Fake)
    monkeypatch.setattr(Fake, "use", staticmethod(use), raising=False)
    yield Fake


def added(group: DistributedGroup) -> bool:
    """Whether a small sum is right on this rank."""
    return bool((group.all_reduce(torch.full((8,), 1.0 + group.rank), "o_proj") == 3).all())


def test_small_sums_of_known_kinds_are_one_kernel(fake: Any) -> None:
    most = MOST_BYTES[2]
    given: dict[str, Callable[[], torch.Tensor]] = {
        "float32": lambda: torch.ones(3, 4),
        "bfloat16": lambda: torch.ones(2, 8, dtype=torch.bfloat16),
        "just small enough": lambda: torch.ones(most // 4),
        "float16": lambda: torch.ones(8, dtype=torch.float16),
        "large": lambda: torch.ones(most // 4 + 4),
        "no whole 16 bytes": lambda: torch.ones(5),
        "not at 16 bytes": lambda: torch.ones(9)[1:],
        "turned": lambda: torch.ones(4, 4, 2).transpose(0, 1),
    }

    def work(group: DistributedGroup) -> tuple[list[str], dict[str, Traffic]]:
        fake.use(group)
        at_once = []
        for name, make in given.items():
            number, x = fake.used.count(group.rank), make()
            total = group.all_reduce(x, name)
            assert bool((total == 2).all()) and total.dtype == x.dtype, name
            if fake.used.count(group.rank) > number:
                at_once.append(name)
        return at_once, group.traffic

    for at_once, traffic in together(2, work):
        assert at_once == ["float32", "bfloat16", "just small enough"]
        assert traffic["float32"] == Traffic(1, 48) and traffic["large"] == Traffic(1, most + 16)


@pytest.mark.parametrize("broken", ("one cannot", "elsewhere", "one fails", "wrong sums", "sums fail"))
def test_where_it_does_not_work_no_rank_uses_it(fake: Any, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    fake.able = [True, broken != "one cannot"]
    fake.working = [True, broken != "one fails"]
    fake.error = {"wrong sums": 0.5, "sums fail": 2.0}.get(broken, 0.0)

    def work(group: DistributedGroup) -> bool:
        fake.use(group, 1 if broken == "elsewhere" else 2)
        return added(group)

    assert together(2, work) == [True, True]
    assert sorted(fake.used) == ([0, 1] if "sums" in broken else []), "tried once at most"
    causes = {r.getMessage().partition(": ")[2] for r in caplog.records}
    assert (
        causes
        == {
            "one cannot": set(),
            "elsewhere": set(),
            "one fails": {"another rank could not", "rank 1 has no peer memory"},
            "wrong sums": {"the first sum was wrong"},
            "sums fail": {"no kernel image is available"},
        }[broken]
    )


def test_who_may_try(monkeypatch: pytest.MonkeyPatch) -> None:
    reachable = {(0, 1), (1, 0)}
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: (device.index, other) in reachable)
    first = torch.device("cuda", 0)
    assert can_meet(first, 2, 2)
    assert not can_meet(first, 4, 4), "it does not reach devices 2 and 3"
    assert not can_meet(first, 2, 1) and not can_meet(first, 3, 3) and not can_meet(CPU, 2, 2)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert not can_meet(first, 2, 2)


@pytest.mark.parametrize("wants_group", (False, True))
def test_torch_is_asked_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch, wants_group: bool) -> None:
    asked: list[tuple[Any, ...]] = []
    told: list[str] = []

    class Memory:
        @staticmethod
        def empty_strided_p2p(*args: Any) -> torch.Tensor:
            size, stride, dtype, device, name = args
            assert stride == (1,) and device == CPU and name.startswith("vlserve-")
            return torch.empty(size, dtype=dtype)

        @staticmethod
        def rendezvous(buffer: torch.Tensor, name: str) -> object:
            group = one_shot.c10d._resolve_process_group(name)
            assert (group.rank(), group.size()) == (0, 2)
            if wants_group and not told:
                raise RuntimeError("get_group_info: no group info associated with the group name")
            return object()

        @staticmethod
        def set_group_info(name: str, rank: int, size: int, store: dist.Store) -> None:
            told.append(name)

    monkeypatch.setattr(one_shot.c10d, "_SymmetricMemory", Memory)
    operator = torch.ops.symm_mem.one_shot_all_reduce_copy_out
    names = [argument.name for argument in operator.default._schema.arguments]
    assert names == ["symm_buffer", "local_input", "reduce_op", "group_name", "out"]
    monkeypatch.setattr(torch.ops.symm_mem, "one_shot_all_reduce_copy_out", lambda *args: asked.append(args))
    made = OneShot(dist.HashStore(), 0, 2, CPU, timedelta(seconds=5))
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    made.all_reduce(x)
    ((shared, mine, operation, name, out),) = asked
    assert shared.shape == mine.shape == out.shape == (16,) and shared.dtype == torch.bfloat16
    assert mine.data_ptr() == out.data_ptr() == x.data_ptr() and operation == "sum" and name == made._name
    assert told == ([name] if wants_group else [])
