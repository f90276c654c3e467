"""From readings to findings, by pure functions: the machine and the ranks. For devices see device_checks.py."""

from __future__ import annotations

from typing import Literal

import msgspec

from vlserve.doctor.host import CUDA_PACKAGES, MAX_SOCKET_PATH, Host, Space
from vlserve.doctor.ranks import Trial

GIB, MIB = 2**30, 2**20
RANK_BYTES = 512 * MIB  # of the host's memory that a rank takes before any weights: Python, torch, buffers
SHARED_BYTES = GIB  # NCCL's buffers and pictures' tiles; docker gives 64 MiB unless told otherwise
TEMP_BYTES = GIB
OPEN_FILES = 1024  # one for each client, some for each rank and each picture that is fetched
SLOW_BUS = 2e9  # bytes a second of a large all-reduce; PCIe by way of the host's memory gives several times as much

Status = Literal["ok", "warning", "failed"]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    status: Status
    found: str
    way_out: str = ""  # unless ok


def ok(name: str, found: str) -> Check:
    return Check(name=name, status="ok", found=found)


def warning(name: str, found: str, way_out: str) -> Check:
    return Check(name=name, status="warning", found=found, way_out=way_out)


def failed(name: str, found: str, way_out: str) -> Check:
    return Check(name=name, status="failed", found=found, way_out=way_out)


def check_host(host: Host, tp: int) -> list[Check]:
    return [
        _versions(host),
        _cores(host, tp),
        _memory(host, tp),
        _shared_memory(host.shared_memory, host.system),
        _limits(host),
        _temp(host),
        _loopback(host),
        _variables(host),
    ]


def _versions(host: Host) -> Check:
    name = "versions"
    missing = [package for package, version in host.packages.items() if version is None and package not in CUDA_PACKAGES]
    if missing:
        return failed(name, f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}, or install vlserve again")
    listed = [f"{package} {version or 'is not installed'}" for package, version in host.packages.items()]
    return ok(name, ", ".join([f"vlserve {host.vlserve}", f"Python {host.python}", *listed, host.system]))


def _cores(host: Host, tp: int) -> Check:
    name, found = "CPU cores", f"{host.num_cores:g} for {tp} {_ranks(tp)} and the front"
    if host.num_cores < tp + 1:
        return warning(name, found, "they will wait for one another; give the machine or the container more, or a smaller --tp")
    return ok(name, found)


def _memory(host: Host, tp: int) -> Check:
    name, found = "memory", f"{host.memory_bytes / GIB:.1f} GiB can be taken"
    needed = tp * RANK_BYTES
    if host.memory_bytes < needed:
        way_out = "give a smaller --tp, end other programs, or raise the container's limit"
        return failed(name, f"{found}; {tp} {_ranks(tp)} need {needed / GIB:.1f} GiB before any weights", way_out)
    return ok(name, found)


def _shared_memory(space: Space, system: str) -> Check:
    name = "shared memory"
    if space.total is None or space.free is None:
        if system.startswith("Linux"):
            return warning(name, f"there is no {space.path}", "mount a tmpfs there; pictures' tiles go to the temporary folder")
        return ok(name, "this system has no folder for it; pictures' tiles go to the temporary folder")
    found = f"{space.path}: {space.free / MIB:.0f} of {space.total / MIB:.0f} MiB free"
    if space.error:
        return warning(name, f"{space.path} cannot be written: {space.error}", "mount it with mode 1777")
    if space.total < SHARED_BYTES:
        way_out = "NCCL and pictures may need more; start docker with --shm-size=8g, or mount a larger tmpfs there"
        return warning(name, found, way_out)
    if space.free < SHARED_BYTES:
        return warning(name, found, f"remove what other programs left there (ls -l {space.path})")
    return ok(name, found)


def _limits(host: Host) -> Check:
    name, found = "limits", f"{_limit(host.open_files)} open files, {_locked(host.locked_bytes)} locked memory"
    if 0 <= host.open_files < OPEN_FILES:
        return warning(name, found, f"clients may be turned away; raise it with ulimit -n {64 * OPEN_FILES}")
    if host.has_infiniband and 0 <= host.locked_bytes < GIB:
        return warning(name, found, "InfiniBand needs locked memory; ulimit -l unlimited, or docker run --ulimit memlock=-1")
    return ok(name, found)


def _temp(host: Host) -> Check:
    name, space = "temp folder", host.temp
    if space.total is None or space.free is None or space.error:
        return failed(name, f"{space.path} cannot be written: {space.error or 'it is not there'}", "set TMPDIR to another folder")
    length = len(host.socket_path.encode())
    if length > MAX_SOCKET_PATH:
        found = f"sockets below {space.path} have names of {length} bytes; the system takes {MAX_SOCKET_PATH}"
        return failed(name, found, "set TMPDIR to a folder with a shorter name, such as /tmp")
    found = f"{space.path}: {space.free / GIB:.1f} GiB free"
    if space.free < TEMP_BYTES:
        return warning(name, found, "make room there, or set TMPDIR to another folder")
    return ok(name, found)


def _loopback(host: Host) -> Check:
    name = "loopback"
    if host.loopback_error:
        way_out = "the ranks talk over it; ip link set lo up, and see that no firewall blocks it"
        return failed(name, f"127.0.0.1 cannot be used: {host.loopback_error}", way_out)
    return ok(name, "127.0.0.1 can be used")


def _variables(host: Host) -> Check:
    name, variables = "variables", host.variables
    found = " ".join(f"{key}={value}" for key, value in variables.items()) or "none of NCCL's, Gloo's, CUDA's and OpenMP's is set"
    chosen = variables.get("NCCL_SOCKET_IFNAME", "")
    if chosen and chosen[0] not in "^=" and not any(i.startswith(tuple(chosen.split(","))) for i in host.interfaces):
        way_out = f"NCCL_SOCKET_IFNAME names none of {', '.join(host.interfaces)}; unset it"
        return failed(name, found, way_out)
    slow = [key for key in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "CUDA_LAUNCH_BLOCKING") if variables.get(key) == "1"]
    if slow:
        return warning(
            name, found, f"{' and '.join(slow)} make{'s' if len(slow) == 1 else ''} ranks slower; unset what is not needed"
        )
    return ok(name, found)


def check_ranks(trial: Trial, *, on_cuda: bool) -> Check:
    name, tp = "ranks", trial.num_ranks
    if trial.failure:
        way_out = "if it is only slow, raise --timeout"
        if on_cuda:
            way_out = (
                "try NCCL_P2P_DISABLE=1, then NCCL_SHM_DISABLE=1; NCCL_DEBUG=INFO shows what NCCL does. " + way_out[0].upper()
            ) + way_out[1:]
        return failed(name, trial.failure, way_out)
    where = ", ".join(dict.fromkeys(trial.devices))
    if not trial.sizes:
        return ok(name, f"1 rank on {where} started in {trial.start_s:.1f} s")
    small, large = trial.sizes[0], trial.sizes[-1]
    found = (
        f"{tp} ranks on {where} met in {trial.start_s:.1f} s and add up right; "
        f"{small.num_bytes // 1024} KiB take {small.seconds * 1000:.3f} ms, "
        f"{large.num_bytes // MIB} MiB go at {large.bus_bytes_per_s / 1e9:.2f} GB/s"
    )
    if on_cuda and large.bus_bytes_per_s < SLOW_BUS:
        way_out = (
            "slow for GPUs: NCCL may be using the network; NCCL_DEBUG=INFO shows it. See the lines on peer access and variables"
        )
        return warning(name, found, way_out)
    return ok(name, found)


def _ranks(tp: int) -> str:
    return "rank" if tp == 1 else "ranks"


def _limit(value: int) -> str:
    return "any number of" if value < 0 else str(value)


def _locked(value: int) -> str:
    return "any amount of" if value < 0 else f"{value / MIB:g} MiB of"
