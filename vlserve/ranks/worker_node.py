"""What runs on the machines that have ranks but no HTTP server: `vlserve serve --node-rank 1` and up."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

from vlserve.config import EngineConfig
from vlserve.errors import VLServeError
from vlserve.models.checkpoint import find_folder, read_checkpoint
from vlserve.plan.tp_plan import check_tp
from vlserve.ranks.supervisor import Supervisor

log = logging.getLogger(__name__)


def run_worker_node(config: EngineConfig) -> int:
    """Run this machine's ranks until machine 0 ends them or a signal comes; returns the exit status."""
    checkpoint = read_checkpoint(find_folder(config.model, config.revision))
    check_tp(
        checkpoint.config,
        config.tp,
        replicate_kv_heads=config.replicate_kv_heads,
        expert_parallel=config.expert_parallel,
    )
    ranks = Supervisor(config)
    ended = threading.Event()
    failure: list[VLServeError] = []

    def on_failure(error: VLServeError) -> None:
        failure.append(error)
        ended.set()

    def on_signal(number: int, frame: FrameType | None) -> None:
        log.info("ending this machine's ranks (signal %d); those of the other machines end with them", number)
        ended.set()

    ranks.on_failure = on_failure
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    log.info(
        "machine %d of %d, ranks %d to %d, meeting at %s",
        *(config.node_rank, config.nnodes, config.node_rank * config.ranks_per_node),
        *((config.node_rank + 1) * config.ranks_per_node - 1, config.rdzv_endpoint),
    )
    try:
        ranks.start()
        while not ended.wait(0.2):  # in steps, so that a signal is seen
            pass
        if failure and not ranks.ended_in_order:
            log.error("%s", failure[0])
            return 1
        log.info("machine 0 has ended" if failure else "ended")
        return 0
    finally:
        ranks.close()
        for number, handler in before.items():
            signal.signal(number, handler)
