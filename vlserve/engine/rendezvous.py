"""How ranks meet: they leave their name in a store, wait for the others within a deadline, and check that they mean the same.

On one machine the store is a file in a private folder; across machines it is torch's TCPStore at an address that was given.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

import vlserve
from vlserve.config import EngineConfig
from vlserve.engine.process_group import CollectiveError
from vlserve.errors import ConfigError, EngineError
from vlserve.models.checkpoint import find_folder

PAUSE_S = 0.02
READ_S = 1.0
SAMPLE_BYTES = 65536  # of a weight file's beginning and of its end, for the fingerprint


def open_store(config: EngineConfig, folder: Path, rank: int) -> dist.Store:
    """The place where all ranks look; raises ConfigError when the endpoint cannot be had, EngineError when nobody is there."""
    if config.rdzv_endpoint is None or config.nnodes == 1:
        return dist.FileStore(str(folder / "store"), config.tp)
    host, _, port = config.rdzv_endpoint.rpartition(":")
    host = host.strip("[]")
    timeout = timedelta(seconds=config.rendezvous_timeout_s)
    try:
        if rank == 0:
            listener = _listen(host, int(port))
            store: dist.Store = dist.TCPStore(
                host, int(port), is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        else:
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise EngineError(
            f"rank {rank} found nobody at rdzv_endpoint {config.rdzv_endpoint} within {config.rendezvous_timeout_s:g} s: is "
            f"machine 0 started, and does a firewall let its port through? ({str(error).splitlines()[0]})"
        ) from error
    return dist.PrefixStore("vlserve", store)


def _listen(host: str, port: int) -> socket.socket:
    """On this address alone, where torch would listen on all of the machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        return listener
    except OSError as error:
        raise ConfigError(
            f"cannot listen on rdzv_endpoint {host}:{port}: {error.strerror}; give a free port at an address of machine 0"
        ) from error


def meet(store: dist.Store, config: EngineConfig, rank: int) -> None:
    """Wait until every rank is here; raises EngineError naming those that are not, or what they disagree about."""
    deadline = time.monotonic() + config.rendezvous_timeout_s
    per_node = config.ranks_per_node
    if store.add(f"claimed/{rank}", 1) > 1:
        raise EngineError(f"rank {rank} was started twice: give each machine a node_rank of its own, 0 to {config.nnodes - 1}")
    try:
        store.set(f"rank/{rank}", "here")
        if config.nnodes > 1:  # the ranks of one machine were started by one front, with the same files
            identity = _identity(config)
            if rank % per_node == 0:  # one for each machine
                store.set(f"node/{rank // per_node}", json.dumps(identity))
            for node in range(config.nnodes):
                _wait(store, [f"node/{node}"], deadline, config, f"machine {node}")
                _compare(identity, json.loads(store.get(f"node/{node}")), node)
        _wait(store, [f"rank/{r}" for r in range(config.tp)], deadline, config, "")
    except RuntimeError as error:  # torch's, when rank 0 is gone, and the store with it
        raise CollectiveError(
            f"rank {rank} lost rank 0 in the rendezvous ({str(error).splitlines()[0]}); the log of rank 0's machine says why"
        ) from error


def report_failure(store: dist.Store, message: str, *, is_last: bool) -> None:
    """Tell the ranks that still wait in `meet`. `is_last`: the store ends with this rank, so they are given time to read."""
    store.set("failed", message)
    time.sleep(READ_S if is_last else 0)


def _wait(store: dist.Store, keys: list[str], deadline: float, config: EngineConfig, what: str) -> None:
    while True:
        absent = [key for key in keys if not store.check([key])]
        if not absent:
            return
        if store.check(["failed"]):
            raise CollectiveError(store.get("failed").decode())
        if time.monotonic() > deadline:
            who = what or "rank " + ", ".join(key.removeprefix("rank/") for key in absent)
            where = f"rdzv_endpoint {config.rdzv_endpoint}" if config.nnodes > 1 else "start-up"
            raise EngineError(
                f"{who} did not join within rendezvous_timeout_s={config.rendezvous_timeout_s:g} s ({where}): "
                "is it started, and with the same tp and nnodes? Is the machine short of memory or stopped?"
            )
        time.sleep(PAUSE_S)


def _identity(config: EngineConfig) -> dict[str, str]:
    """What must be the same on every machine."""
    from torch import __version__ as torch_version

    same = (
        "tp",
        "nnodes",
        "dtype",
        "lm_head_bits",
        "max_model_len",
        "block_size",
        "kv_cache_dtype",
        "replicate_kv_heads",
        "expert_parallel",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
        "vision_cache_gib",
    )
    options = {name: str(getattr(config, name)) for name in same}
    return options | {
        "vlserve version": vlserve.__version__,
        "torch version": torch_version.partition("+")[0],
        "checkpoint": _fingerprint(find_folder(config.model, config.revision)),
    }


def _compare(mine: dict[str, str], theirs: dict[str, str], node: int) -> None:
    differing = [
        f"{key} is {mine.get(key)} here and {theirs.get(key)} there"
        for key in {**mine, **theirs}
        if mine.get(key) != theirs.get(key)
    ]
    if differing:
        raise EngineError(
            f"machine {node} was not started like this one: {'; '.join(differing)}. Give the same options and the same files"
        )


def _fingerprint(folder: Path) -> str:
    """Of config.json and, for each weight file, its size, beginning (with all names and shapes) and end."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.rglob("*.safetensors")]):
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size} ".encode() + file.read(SAMPLE_BYTES))
            file.seek(max(0, size - SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]
