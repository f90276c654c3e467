"""Readings of the machine: packages, memory, limits, the temporary folder, the network, variables. No torch, and no opinion."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

import vlserve
from vlserve.plan.host_memory import available_memory

PACKAGES = ("torch", "transformers", "tokenizers", "timm", "pyzmq", "msgspec", "safetensors", "xgrammar", "pillow", "fastapi")
CUDA_PACKAGES = ("triton",)
SHARED = Path("/dev/shm")
# of other programs' variables; VLSERVE_API_KEYS is a secret and never shown
PREFIXES = ("NCCL_", "GLOO_", "OMP_", "TORCH_NCCL_", "PYTORCH_CUDA_", "PYTORCH_ALLOC_")
NAMES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "NVIDIA_VISIBLE_DEVICES", "TMPDIR")
SOCKET_NAME = "/run-0/requests"  # the longest one in a run's folder
MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103  # bytes, of the system's struct sockaddr_un


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """Of a file system, in bytes; both are None where it does not exist."""

    path: str
    total: int | None = None
    free: int | None = None
    error: str = ""  # why nothing can be written there


class Host(msgspec.Struct, frozen=True, kw_only=True):
    python: str
    system: str
    vlserve: str
    packages: dict[str, str | None]  # None: not installed
    shared_memory: Space
    temp: Space
    socket_path: str  # as long as the longest one of a run
    memory_bytes: int  # that can still be taken
    num_cores: float  # that this process may use
    open_files: int  # -1: no limit
    locked_bytes: int
    has_infiniband: bool
    loopback_error: str  # "": 127.0.0.1 can be used
    interfaces: list[str]
    variables: dict[str, str]


def read_host() -> Host:
    temp = tempfile.gettempdir()
    return Host(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        vlserve=vlserve.__version__,
        packages={name: _version(name) for name in (*PACKAGES, *CUDA_PACKAGES)},
        shared_memory=_read_space(SHARED),
        temp=_read_space(Path(temp)),
        socket_path=f"{temp}/vlserve-12345678{SOCKET_NAME}",
        memory_bytes=int(available_memory()),
        num_cores=_count_cores(),
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_bytes=_limit(resource.RLIMIT_MEMLOCK),
        has_infiniband=any(Path("/sys/class/infiniband").glob("*")),
        loopback_error=_try_loopback(),
        interfaces=[name for _, name in socket.if_nameindex()],
        variables=_pick(os.environ),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read_space(path: Path) -> Space:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return Space(path=str(path))
    error = ""
    try:
        with tempfile.TemporaryDirectory(prefix="vlserve-", dir=path) as folder:
            (Path(folder) / "file").write_bytes(bytes(4096))
    except OSError as problem:
        error = problem.strerror or str(problem)
    return Space(path=str(path), total=usage.total, free=usage.free, error=error)


def _count_cores() -> float:
    """Cores that the system lets this process run on, or a container's share of them (cgroup v2)."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, quota / period)
    return cores


def _limit(which: int) -> int:
    soft = resource.getrlimit(which)[0]
    return -1 if soft == resource.RLIM_INFINITY else soft


def _try_loopback() -> str:
    """A byte over 127.0.0.1, where the ranks talk to one another; "" or what is wrong."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(2)
            with socket.create_connection(server.getsockname(), timeout=2) as client:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(2)
                    client.sendall(b"x")
                    return "" if connection.recv(1) == b"x" else "the connection was closed"
    except OSError as error:
        return error.strerror or str(error)


def _pick(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: environment[name] for name in sorted(environment) if name in NAMES or name.startswith(PREFIXES)}
