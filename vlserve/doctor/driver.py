"""Readings of the NVIDIA driver: its version, its GPUs, who uses them, how they are connected. Without a driver, nothing."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")  # nvidia-smi underlines the heading
SMI_TIMEOUT_S = 20


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process on a GPU; bytes are None where the driver does not tell, as in containers."""

    pid: int
    used_bytes: int | None = None


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """As the driver counts them, which CUDA_VISIBLE_DEVICES does not change."""

    index: int
    uuid: str
    name: str
    total_bytes: int | None = None
    used_bytes: int | None = None
    processes: list[Process] = []


class Driver(msgspec.Struct, frozen=True, kw_only=True):
    """`version` is None without a driver; `error` says what is wrong with one that is there."""

    version: str | None = None
    cuda: tuple[int, int] | None = None  # the newest CUDA that it runs
    gpus: list[Gpu] = []
    links: dict[str, str] = {}  # "0-1" -> NV4, PIX, PXB, PHB, NODE or SYS, as `nvidia-smi topo -m` names them
    error: str = ""


def read_driver() -> Driver:
    try:
        import pynvml
    except ImportError:
        return Driver(error="the package nvidia-ml-py is not installed" if has_device_files() else "")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Driver(error=str(error) if has_device_files() else "")
    try:
        cuda = _ask(pynvml.nvmlSystemGetCudaDriverVersion_v2)
        return Driver(
            version=_ask(pynvml.nvmlSystemGetDriverVersion),
            cuda=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
            gpus=[gpu for index in range(_ask(pynvml.nvmlDeviceGetCount) or 0) if (gpu := _read_gpu(index)) is not None],
            links=_read_links(),
        )
    finally:
        pynvml.nvmlShutdown()


def has_device_files() -> bool:
    """A GPU's kernel driver is loaded, whatever else is missing."""
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists()


def parse_topology(text: str) -> dict[str, str]:
    """From `nvidia-smi topo -m`: the connection of each pair of GPUs, once, by "0-1"."""
    rows = [_ESCAPE.sub("", line).split("\t") for line in text.splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    heading = next((row for row in rows if "GPU0" in row and row[0] != "GPU0"), None)
    if heading is None:
        return {}
    columns = {column: place for place, column in enumerate(heading) if re.fullmatch(r"GPU\d+", column)}
    links = {}
    for row in rows:
        if not re.fullmatch(r"GPU\d+", row[0]):
            continue
        for column, place in columns.items():
            one, other = int(row[0][3:]), int(column[3:])
            if one < other and place < len(row) and row[place]:
                links[f"{one}-{other}"] = row[place]
    return links


def _read_links() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=SMI_TIMEOUT_S)
        return parse_topology(done.stdout)
    return {}


def _read_gpu(index: int) -> Gpu | None:
    import pynvml

    handle = _ask(pynvml.nvmlDeviceGetHandleByIndex, index)
    if handle is None:
        return None
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    processes = [
        *(_ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []),
        *(_ask(pynvml.nvmlDeviceGetGraphicsRunningProcesses, handle) or []),
    ]
    return Gpu(
        index=index,
        uuid=str(_ask(pynvml.nvmlDeviceGetUUID, handle) or ""),
        name=str(_ask(pynvml.nvmlDeviceGetName, handle) or "?"),
        total_bytes=None if memory is None else memory.total,
        used_bytes=None if memory is None else memory.used,
        processes=[Process(pid=process.pid, used_bytes=process.usedGpuMemory) for process in processes],
    )


def _ask(question: Any, *arguments: Any) -> Any:
    """None where a device or a driver cannot answer."""
    import pynvml

    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None
