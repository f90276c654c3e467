"""Several ranks as threads of this process: the same code as in processes, without their start-up time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests import compatibility
from vlserve.config import EngineConfig
from vlserve.engine.engine import Engine, Seat, build_runner
from vlserve.engine.pixel_store import PixelStore
from vlserve.engine.process_group import DistributedGroup
from vlserve.engine.rank_status import RankStatusWriter
from vlserve.engine.runner import Runner
from vlserve.models.checkpoint import find_checkpoint


class SharedPixels(PixelStore):
    """What rank 0's requests brought, for all ranks; stands for the files of shared memory."""

    def __init__(self) -> None:
        super().__init__([])
        self.pixels: dict[bytes, torch.Tensor] = {}

    def lend(self, pixels: Mapping[bytes, torch.Tensor]) -> None:
        self.pixels.update(pixels)

    def open(self, digest: bytes, num_bytes: int) -> torch.Tensor:
        return self.pixels[digest]


Seated = Callable[[EngineConfig, int], contextlib.AbstractContextManager[Seat]]


@contextlib.contextmanager
def tp_engine(folder: Path, tp: int, *, seated: Seated | None = None, **options: Any) -> Iterator[tuple[Engine, list[Runner]]]:
    """An engine on `tp` ranks and the runners of all of them; ends them with the block. `lend` comes before the step's encode.

    Args:
        seated: for each rank's thread, in place of the CPU.
    """
    config = EngineConfig(
        **{"model": str(folder), "tp": tp, "device": "cpu", "kv_cache_gib": 0.01, "dtype": "float32", **options}
    )
    store, pixels = dist.HashStore(), SharedPixels()
    runners: list[Runner | None] = [None] * tp
    errors: list[BaseException] = []

    def on_the_cpu(config: EngineConfig, rank: int) -> contextlib.AbstractContextManager[Seat]:
        group = DistributedGroup(store, rank, tp, address="127.0.0.1", timeout_s=60, status=RankStatusWriter())
        return contextlib.nullcontext(Seat(group=group, local_rank=rank % config.ranks_per_node))

    @contextlib.contextmanager
    def at_rank(rank: int) -> Iterator[Seat]:
        is_here = rank < config.ranks_per_node  # on rank 0's machine; to the others rank 0 must send what they need
        with (seated or on_the_cpu)(config, rank) as seat:
            yield replace(seat, pixels=pixels if is_here else PixelStore([]))

    def follow(rank: int) -> None:
        try:
            with at_rank(rank) as seat:
                runner = runners[rank] = build_runner(find_checkpoint(config), config, seat, lambda name, done, total: None)
                while runner.follow():
                    pass
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, tp)]
    for thread in threads:
        thread.start()
    with at_rank(0) as first:
        engine = Engine(config, seat=first)
        compatibility.made(engine, config)
        runners[0] = engine.runner
        while any(runner is None for runner in runners) and not errors:  # they warmed up together, so they are as good as built
            time.sleep(0.001)
        try:
            yield engine, [runner for runner in runners if runner is not None]
        finally:
            try:
                engine.runner.idle(is_last=True)
            finally:
                for thread in threads:
                    thread.join(timeout=60)
    assert not errors, errors
