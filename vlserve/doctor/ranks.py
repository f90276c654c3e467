"""Starts the ranks as a server would, without a model, and reports how far they came."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from vlserve.config import EngineConfig
from vlserve.engine.messages import Failed, FromRank, Preflight, Stage
from vlserve.ranks.launch import GPU_HINTS, Ranks
from vlserve.ranks.supervisor import ECHO_S

POLL_MS = 100

OnStage = Callable[[Ranks, Stage], None]


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """An all-reduce of one size, as its slowest rank saw it."""

    num_bytes: int
    seconds: float
    bus_bytes_per_s: float  # what the slowest link carries at least: 2 (n - 1) / n of the bytes, as nccl-tests counts


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the ranks; `failure` is "" when all of them came to the end."""

    failure: str
    num_ranks: int
    devices: list[str]  # of each rank
    start_s: float  # until all ranks had met
    sizes: list[Size]


def try_ranks(config: EngineConfig, timeout_s: float, on_stage: OnStage = lambda ranks, stage: None) -> Trial:
    """Starts `config.tp` ranks, waits for their report, ends them; also when it is interrupted. Nothing stays behind.

    `timeout_s` bounds the time without news from any rank, and what ranks do is a short list of steps.
    """
    folder = Path(tempfile.mkdtemp(prefix="vlserve-"))  # mode 0700
    try:
        with zmq.Context() as context, context.socket(zmq.PULL) as events:
            events.bind(f"ipc://{folder}/events")
            return _watch(config, folder, events, timeout_s, on_stage)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(config: EngineConfig, folder: Path, events: zmq.Socket[bytes], timeout_s: float, on_stage: OnStage) -> Trial:
    decoder = msgspec.msgpack.Decoder(FromRank)
    reports: dict[int, Preflight] = {}
    begun = last_sign = time.monotonic()
    met_s, echo, failure = 0.0, "", ""
    ranks = Ranks(config, folder, [], task="preflight")
    try:
        while not failure and len(reports) < config.tp:
            if events.poll(POLL_MS):
                message = decoder.decode(events.recv())
                last_sign = time.monotonic()
                if isinstance(message, Stage):
                    ranks.saw(message)
                    if not met_s and ranks.slowest.name == "all-reduce":
                        met_s = last_sign - begun
                    on_stage(ranks, message)
                elif isinstance(message, Preflight):
                    reports[message.rank] = message
                elif isinstance(message, Failed) and message.is_echo:
                    echo = echo or message.message
                elif isinstance(message, Failed):
                    failure = message.message
                continue
            waited, (killed, left) = time.monotonic() - last_sign, ranks.find_dead()
            echo = echo or left or ""
            if killed is not None:
                failure = killed
            elif echo:
                failure = "; ".join(dict.fromkeys(filter(None, (left, echo)))) if waited > ECHO_S else ""
            elif waited > timeout_s:
                stall = ranks.explain_stall().removesuffix(f". {GPU_HINTS}")
                failure = f"no progress for {waited:.0f} s in stage {ranks.slowest.name!r}: {stall}"
    finally:
        ranks.end(wait_s=0)
    return Trial(
        failure=failure,
        num_ranks=config.tp,
        devices=[reports[rank].device for rank in sorted(reports)],
        start_s=met_s or time.monotonic() - begun,
        sizes=[] if failure else _slowest(reports, config.tp),
    )


def _slowest(reports: dict[int, Preflight], num_ranks: int) -> list[Size]:
    sizes = []
    for times in zip(*(report.all_reduce for report in reports.values()), strict=True):
        seconds = max(entry.seconds for entry in times)
        share = 2 * (num_ranks - 1) / num_ranks
        sizes.append(Size(num_bytes=times[0].num_bytes, seconds=seconds, bus_bytes_per_s=times[0].num_bytes * share / seconds))
    return sizes
