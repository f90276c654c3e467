"""The collectives themselves, for every type that travels, and the one message that begins a step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist

from vlserve.engine.process_group import BATCH_BYTES, DistributedGroup, Traffic
from vlserve.engine.rank_status import RankStatusWriter

T = TypeVar("T")


def together(size: int, work: Callable[[DistributedGroup], T]) -> list[T]:
    """What `work` gives on each of `size` ranks, which are threads."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        return work(DistributedGroup(store, rank, size, address="127.0.0.1", timeout_s=20, status=RankStatusWriter()))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("size", (2, 3, 4))
def test_every_collective_of_the_model_in_every_type(size: int, dtype: torch.dtype) -> None:
    def mine(rank: int) -> torch.Tensor:
        return (torch.arange(15).view(3, 5) * 0.25 + rank).to(dtype)

    def work(group: DistributedGroup) -> list[torch.Tensor | None]:
        turned = mine(group.rank).T.contiguous().T  # not contiguous
        return [
            group.all_reduce(mine(group.rank), "sum"),
            group.gather(turned, "side by side"),
            group.all_gather(turned, "all"),
            group.broadcast(mine(group.rank), "first"),
        ]

    parts = [mine(rank) for rank in range(size)]
    for rank, (total, row, every, first) in enumerate(together(size, work)):
        assert total is not None and every is not None and first is not None
        assert torch.equal(total, torch.stack(parts).float().sum(0).to(dtype)) and total.dtype == dtype
        assert (row is None) == (rank > 0)
        assert row is None or torch.equal(row, torch.cat(parts, dim=-1))
        assert torch.equal(every, torch.stack(parts)) and torch.equal(first, parts[0])


def test_the_minimum_and_the_first_check() -> None:
    def work(group: DistributedGroup) -> int:
        group.check(torch.device("cpu"))
        return group.minimum(10 - group.rank, "least")

    assert together(4, work) == [7] * 4


def test_what_a_graph_moves_is_counted_when_it_is_replayed() -> None:
    def work(group: DistributedGroup) -> tuple[dict[str, Traffic], dict[str, Traffic]]:
        assert not group.can_record, "Gloo's collectives are no part of a graph"
        before = group.seconds
        with group.recording() as moved:
            group.all_reduce(torch.ones(3), "o_proj")
        assert group.seconds == before and "o_proj" not in group.traffic
        for _ in range(2):
            group.count(moved)
        return moved, group.traffic

    for moved, traffic in together(2, work):
        assert moved == {"o_proj": Traffic(1, 12)} and traffic["o_proj"] == Traffic(2, 24)


def test_pixels_go_from_rank_0_to_one_other() -> None:
    def work(group: DistributedGroup) -> torch.Tensor | None:
        if group.rank == 0:
            for to in (2, 1):
                group.send(torch.full((3, 4), to, dtype=torch.uint8), to, "pixels")
            return None
        return group.receive(torch.empty(3, 4, dtype=torch.uint8), "pixels")

    _, one, two = together(3, work)
    assert one is not None and two is not None and bool((one == 1).all()) and bool((two == 2).all())


def test_messages_of_any_length_arrive_whole() -> None:
    lengths = [0, 1, 100, BATCH_BYTES - 9, BATCH_BYTES - 8, BATCH_BYTES - 7, BATCH_BYTES, 3 * BATCH_BYTES, 200_001, 5]
    messages = [torch.randint(0, 256, (length,), dtype=torch.uint8).numpy().tobytes() for length in lengths]

    def work(group: DistributedGroup) -> tuple[list[bytes], dict[str, Traffic]]:
        if group.rank == 0:
            for message in messages:
                group.broadcast_message(message)
            return messages, group.traffic
        return [group.receive_message() for _ in messages], group.traffic

    for received, traffic in together(3, work):
        assert received == messages
        assert traffic["batch"] == Traffic(len(messages), len(messages) * BATCH_BYTES)
        long = [8 + length - BATCH_BYTES for length in lengths if 8 + length > BATCH_BYTES]
        assert traffic["batch_rest"] == Traffic(len(long), sum(long))
