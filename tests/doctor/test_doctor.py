"""The doctor: real ranks on this machine, ranks that die or stand still, and each finding from made-up readings."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
from msgspec.structs import replace

from tests.settling import PATIENCE_S, eventually, is_alive, wait_until
from vlserve.config import EngineConfig
from vlserve.doctor import probe, ranks
from vlserve.doctor.checks import GIB, MIB, Check, check_host, check_ranks
from vlserve.doctor.device_checks import check_devices
from vlserve.doctor.driver import Driver, Gpu, Process, parse_topology
from vlserve.doctor.host import Host, Space, _pick
from vlserve.doctor.probe import Begun, Copy, Device, Reading, Torch
from vlserve.doctor.ranks import Size, Trial, try_ranks
from vlserve.engine import preflight
from vlserve.engine.messages import Stage
from vlserve.errors import EngineError
from vlserve.llm.parallel import Group
from vlserve.ranks.launch import Ranks

COMMAND = [sys.executable, "-m", "vlserve", "doctor", "--device", "cpu"]


def doctor(temp: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TMPDIR": str(temp), "VLSERVE_API_KEYS": "very-secret-key", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env=environment)


def test_two_ranks_add_up_and_leave_nothing_behind(temp: Path) -> None:
    done = doctor(temp, "--tp", "2", "--json")
    document = json.loads(done.stdout)
    statuses = {check["name"]: check["status"] for check in document["checks"]}
    assert done.returncode == 0 and document["passed"] and "failed" not in statuses.values(), done.stdout
    assert statuses["ranks"] == "ok" and (document["tp"], document["device"]) == (2, "cpu")
    sizes = document["ranks"]["sizes"]
    assert [size["num_bytes"] for size in sizes] == list(preflight.SIZES)
    for size in sizes:  # with two ranks the bus carries each byte once
        assert size["bus_bytes_per_s"] == pytest.approx(size["num_bytes"] / size["seconds"])
    assert document["probe"]["torch"]["version"] == torch.__version__
    assert document["host"]["variables"]["OMP_NUM_THREADS"] == "1" and "very-secret-key" not in done.stdout
    assert list(temp.glob("vlserve-*")) == []


def test_one_rank_needs_no_one_to_add_up_with(temp: Path) -> None:
    done = doctor(temp)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "ok      ranks: 1 rank on cpu started in" in done.stdout
    assert "all-reduce" not in done.stdout and lines[-1] == "This machine will serve with 1 rank"
    assert all(line.startswith(("ok ", "warning ")) for line in lines[:-2])


def test_more_ranks_than_memory_fails_before_any_is_started(temp: Path) -> None:
    done = doctor(temp, "--tp", "100000")
    assert done.returncode == 1 and "FAILED  memory" in done.stdout and "ranks:" not in done.stdout
    assert done.stdout.splitlines()[-1] == "This machine will not serve with 100000 ranks until this is mended: memory"
    assert "tp is 0" in doctor(temp, "--tp", "0").stderr and "--timeout is 0" in doctor(temp, "--timeout", "0").stderr


def rank_processes(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if "vlserve.rank" in child.cmdline():
                found.append(child)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_its_ranks(temp: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*COMMAND, "--tp", "2"], env=os.environ | {"TMPDIR": str(temp)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            started = eventually(lambda: rank_processes(process.pid), lambda found: len(found) == 2, "two ranks start")
            process.send_signal(number)
            process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    # one that was just being started ends when it sees that its parent is gone
    wait_until(lambda: not any(map(is_alive, started)), "the ranks end")
    assert list(temp.glob("vlserve-*")) == []


def at_second_size(act: Callable[[Ranks], None]) -> Callable[[Ranks, Stage], None]:
    """Acts once, when all ranks have met and all-reduces are under way."""
    done = []

    def on_stage(ranks: Ranks, stage: Stage) -> None:
        if stage.done == 1 and not done:
            done.append(True)
            act(ranks)

    return on_stage


def test_a_rank_that_is_killed_is_named() -> None:
    trial = try_ranks(EngineConfig(tp=2, device="cpu"), 60, at_second_size(lambda ranks: os.kill(ranks.pids[1], signal.SIGKILL)))
    assert "the process of rank 1 ended (killed by signal 9) in stage 'all-reduce'" in trial.failure
    assert trial.sizes == [] and check_ranks(trial, on_cuda=False).status == "failed"


class Clock:
    """The real one until `runs` is set; then ten seconds pass whenever somebody looks."""

    def __init__(self) -> None:
        self.runs, self._ahead_s = False, 0.0

    def monotonic(self) -> float:
        self._ahead_s += 10.0 if self.runs else 0.0
        return time.monotonic() + self._ahead_s


def test_a_rank_that_stands_still_is_named_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(ranks, "time", clock)
    pids: list[int] = []

    def stop(started: Ranks) -> None:
        pids.extend(started.pids.values())
        os.kill(started.pids[1], signal.SIGSTOP)
        clock.runs = True

    trial = try_ranks(EngineConfig(tp=2, device="cpu"), 60, at_second_size(stop))
    assert "in stage 'all-reduce': rank 1 is stopped" in trial.failure
    assert not any(map(psutil.pid_exists, pids))


class Pair(Group):
    """Rank 0 of two; the other has the numbers that `time_all_reduce` gives it, or is broken."""

    size = 2

    def __init__(self, *, is_broken: bool) -> None:
        self.is_broken = is_broken

    def all_reduce(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        if kind == "preflight":
            x.add_(x + 1)
            if self.is_broken and x.numel() > 10_000:
                x[-1] += 1
        return x


def test_a_wrong_sum_is_an_error_and_not_a_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SIZES", (8192, 65536))
    device, progress = torch.device("cpu"), list[tuple[int, int]]()
    times = preflight.time_all_reduce(Pair(is_broken=False), device, lambda *done: progress.append(done))
    assert [entry.num_bytes for entry in times] == [8192, 65536] and progress == [(0, 2), (1, 2)]
    with pytest.raises(EngineError, match="all-reduce of 65536 bytes on cpu gave a wrong sum"):
        preflight.time_all_reduce(Pair(is_broken=True), device, lambda *done: None)


def test_a_probe_that_does_not_end_is_ended_and_what_it_said_is_kept() -> None:
    assert probe.probe(cuda=False, num_devices=1, timeout_s=0.01) == Reading(error="no answer within 0 s")
    said = b"".join(msgspec.json.encode(line) + b"\n" for line in (TORCH, DEVICES[0], Begun(source=0, target=1)))
    reading = probe.read_lines(b"a warning\n" + said + b'{"type":"Copy","sou', "no answer within 60 s")
    assert (reading.torch, reading.devices, reading.copies) == (TORCH, [DEVICES[0]], [])
    assert reading.stuck == Begun(source=0, target=1)
    assert probe._explain(-11, b"", 60) == "the process ended (killed by signal 11)"
    assert probe._explain(1, b"Traceback\nImportError: libcudart.so.13", 60) == "ImportError: libcudart.so.13"


HOST = Host(
    python="3.11.7",
    system="Linux 6.8 x86_64",
    vlserve="0.1.0",
    packages={"torch": "2.14.1", "timm": "1.0.31", "triton": None},
    shared_memory=Space(path="/dev/shm", total=32 * GIB, free=32 * GIB),
    temp=Space(path="/tmp", total=100 * GIB, free=50 * GIB),
    socket_path="/tmp/vlserve-12345678/run-0/requests",
    memory_bytes=64 * GIB,
    num_cores=16,
    open_files=1024,
    locked_bytes=8 * MIB,
    has_infiniband=False,
    loopback_error="",
    interfaces=["lo", "eth0"],
    variables={},
)


def test_a_good_machine_has_no_findings() -> None:
    assert [check.status for check in check_host(HOST, 4)] == ["ok"] * 8


@pytest.mark.parametrize(
    ("changes", "status", "name", "found", "way_out"),
    [
        ({"packages": {"torch": "2.14.1", "timm": None}}, "failed", "versions", "not installed: timm", "pip install timm"),
        ({"num_cores": 4}, "warning", "CPU cores", "4 for 4 ranks and the front", "smaller --tp"),
        ({"memory_bytes": GIB}, "failed", "memory", "4 ranks need 2.0 GiB", "smaller --tp"),
        (
            {"shared_memory": Space(path="/dev/shm", total=64 * MIB, free=64 * MIB)},
            *("warning", "shared memory", "64 of 64 MiB free", "--shm-size=8g"),
        ),
        (
            {"shared_memory": Space(path="/dev/shm", total=8 * GIB, free=3 * MIB)},
            *("warning", "shared memory", "3 of 8192 MiB free", "remove what other programs left"),
        ),
        ({"shared_memory": Space(path="/dev/shm")}, "warning", "shared memory", "there is no /dev/shm", "mount a tmpfs"),
        (
            {"shared_memory": Space(path="/dev/shm", total=8 * GIB, free=8 * GIB, error="Permission denied")},
            *("warning", "shared memory", "Permission denied", "mode 1777"),
        ),
        ({"open_files": 256}, "warning", "limits", "256 open files", "ulimit -n 65536"),
        ({"has_infiniband": True}, "warning", "limits", "8 MiB of locked memory", "ulimit -l unlimited"),
        ({"temp": Space(path="/t", total=GIB, free=GIB, error="Read-only")}, "failed", "temp folder", "Read-only", "TMPDIR"),
        ({"temp": Space(path="/t", total=GIB, free=9 * MIB)}, "warning", "temp folder", "0.0 GiB free", "make room"),
        ({"socket_path": "/long" * 30}, "failed", "temp folder", "150 bytes", "shorter name"),
        ({"loopback_error": "Network is down"}, "failed", "loopback", "Network is down", "ip link set lo up"),
        ({"variables": {"NCCL_P2P_DISABLE": "1"}}, "warning", "variables", "NCCL_P2P_DISABLE=1", "makes ranks slower"),
        ({"variables": {"NCCL_SOCKET_IFNAME": "ib0,ib1"}}, "failed", "variables", "=ib0,ib1", "none of lo, eth0"),
    ],
)  # fmt: skip
def test_findings_about_the_machine(changes: dict[str, Any], status: str, name: str, found: str, way_out: str) -> None:
    check = the_only_finding(check_host(replace(HOST, **changes), 4))
    assert (check.status, check.name) == (status, name)
    assert found in check.found and way_out in check.way_out


def the_only_finding(checks: list[Check]) -> Check:
    (check,) = [check for check in checks if check.status != "ok"]
    return check


def test_what_is_not_a_finding() -> None:
    for changes in (
        {"shared_memory": Space(path="/dev/shm"), "system": "Darwin 24.1 arm64"},
        {"open_files": -1, "locked_bytes": -1, "has_infiniband": True},
        {"variables": {"NCCL_SOCKET_IFNAME": "eth", "NCCL_DEBUG": "INFO"}},
        {"variables": {"NCCL_SOCKET_IFNAME": "^docker"}},
    ):
        assert {check.status for check in check_host(replace(HOST, **changes), 4)} == {"ok"}


def test_only_variables_without_secrets_are_shown() -> None:
    shown = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": ""}
    assert _pick(shown | {"VLSERVE_API_KEYS": "x", "HF_TOKEN": "x", "PATH": "/bin"}) == shown


TORCH = Torch(
    version="2.14.1+cu130",
    cuda="13.0",
    nccl="2.30.7",
    has_gloo=True,
    architectures=["sm_80", "sm_90", "compute_120"],
    num_devices=2,
    complaint="",
)
DEVICES = [
    Device(index=i, name="H100", uuid=f"uuid-{i}", capability=(9, 0), total_bytes=80 * GIB, free_bytes=79 * GIB) for i in (0, 1)
]
COPIES = [Copy(source=s, target=t, has_access=True, is_right=True) for s, t in ((0, 1), (1, 0))]
READING = Reading(torch=TORCH, devices=DEVICES, copies=COPIES)
DRIVER = Driver(
    version="580.65",
    cuda=(13, 0),
    gpus=[Gpu(index=3 - i, uuid=f"GPU-uuid-{i}", name="H100") for i in (0, 1)],  # the driver counts in another order
    links={"2-3": "NV18", "0-1": "SYS"},
)
BLIND = Reading(torch=replace(TORCH, num_devices=0, complaint="CUDA driver initialization failed"))


def test_two_good_devices() -> None:
    checks = check_devices(READING, DRIVER, HOST, "auto", 2)
    assert [check.status for check in checks] == ["ok"] * 6
    found = {check.name: check.found for check in checks}
    assert found["devices"] == "2 x H100 (capability 9.0)" and found["topology"] == "NVLink (NV18) between 0-1"
    assert found["driver"] == "NVIDIA 580.65, for CUDA up to 13.0" and "all direct" in found["peer access"]


def test_a_laptop_without_a_gpu() -> None:
    reading = Reading(torch=replace(TORCH, num_devices=0))
    for device in ("auto", "cpu"):
        assert [check.status for check in check_devices(reading, Driver(), HOST, device, 2)] == ["ok"] * 3
    check = the_only_finding(check_devices(reading, Driver(), HOST, "cuda", 2))
    assert check.status == "failed" and check.found == "torch sees no CUDA device" and "--device cpu" in check.way_out


def devices(**changes: Any) -> list[Device]:
    return [DEVICES[0], replace(DEVICES[1], **changes)]


@pytest.mark.parametrize(
    ("reading", "driver", "host", "status", "name", "found", "way_out"),
    [
        (Reading(error="ImportError: libcudart"), {}, {}, "failed", "torch", "ImportError: libcudart", "install torch"),
        (replace(READING, torch=replace(TORCH, nccl=None)), {}, {}, "failed", "torch", "without NCCL", "install one"),
        (replace(READING, torch=replace(TORCH, has_gloo=False)), {}, {}, "failed", "torch", "without Gloo", "install one"),
        (READING, {"version": None, "error": "a mismatch"}, {}, "failed", "driver", "a mismatch", "restart the machine"),
        (
            replace(READING, devices=[DEVICES[0]], error="no answer within 60 s"),
            *({}, {}, "failed", "devices", "device 1 does not answer: no answer", "dmesg"),
        ),
        (
            replace(READING, devices=devices(error="CUDA error: no kernel image", capability=(7, 0))),
            *({}, {}, "failed", "devices", "device 1 (H100, capability 7.0): CUDA error", "built for sm_80, sm_90"),
        ),
        (
            replace(READING, devices=devices(error="CUDA error: busy or unavailable")),
            *({}, {}, "failed", "devices", "busy or unavailable", "nvidia-smi"),
        ),
        (replace(READING, devices=devices(name="A100")), {}, {}, "warning", "devices", "1 x A100", "wait for the slowest"),
        (replace(READING, devices=devices(free_bytes=GIB)), {}, {}, "warning", "device memory", "1.0 of 80.0 GiB", "lower --gpu"),
        (
            READING,
            {"gpus": [replace(DRIVER.gpus[0], processes=[Process(pid=4711, used_bytes=GIB)]), DRIVER.gpus[1]]},
            *({}, "warning", "device memory", "process 4711 on device 0 with 1.0 GiB", "end what uses"),
        ),
        (READING, {"links": {"2-3": "SYS"}}, {}, "warning", "topology", "PCIe across sockets (SYS) between 0-1", "one socket"),
        (
            replace(READING, copies=[COPIES[0], replace(COPIES[1], is_right=False)]),
            *({}, {}, "failed", "peer access", "wrong bytes: 1 to 0", "NCCL_P2P_DISABLE=1"),
        ),
        (
            replace(READING, copies=[], stuck=Begun(source=0, target=1), error="no answer within 60 s"),
            *({}, {}, "failed", "peer access", "from device 0 to 1 failed: no answer", "NCCL_P2P_DISABLE=1"),
        ),
        (
            replace(READING, copies=[replace(COPIES[0], has_access=False), COPIES[1]]),
            *({}, {}, "warning", "peer access", "no direct access from 0 to 1", "slower"),
        ),
    ],
)  # fmt: skip
def test_findings_about_devices(
    reading: Reading, driver: dict[str, Any], host: dict[str, Any], status: str, name: str, found: str, way_out: str
) -> None:
    check = the_only_finding(check_devices(reading, replace(DRIVER, **driver), replace(HOST, **host), "auto", 2))
    assert (check.status, check.name) == (status, name)
    assert found in check.found and way_out in check.way_out


def test_wrong_copies_do_not_matter_where_nobody_makes_them() -> None:
    reading = replace(READING, copies=[replace(copy, is_right=False) for copy in COPIES])
    check = the_only_finding(check_devices(reading, DRIVER, replace(HOST, variables={"NCCL_P2P_DISABLE": "1"}), "auto", 2))
    assert (check.status, check.name) == ("warning", "peer access")


def test_a_driver_too_old_for_torch() -> None:
    old = replace(DRIVER, version="550.54", cuda=(12, 4))
    for device, status in (("auto", "failed"), ("cuda", "failed"), ("cpu", "warning")):
        check = next(check for check in check_devices(BLIND, old, HOST, device, 2) if check.name == "driver")
        assert check.status == status and "for CUDA up to 12.4, is too old for torch's CUDA 13.0" in check.found
        assert "update the driver to 580 or newer, or install a torch built for CUDA 12" in check.way_out
    # NVIDIA's compatibility package, and a newer minor version of the same CUDA, run well
    for cuda in ((12, 4), (13, 2)):
        assert "failed" not in {c.status for c in check_devices(READING, replace(DRIVER, cuda=cuda), HOST, "auto", 2)}


def test_gpus_that_torch_does_not_see() -> None:
    hidden = check_devices(replace(BLIND, torch=replace(BLIND.torch, complaint="")), DRIVER, hiding(""), "auto", 1)
    check = the_only_finding(hidden)
    assert (check.status, check.name) == ("failed", "devices") and "CUDA_VISIBLE_DEVICES is ''" in check.found
    without = Reading(torch=replace(TORCH, cuda=None, num_devices=0))
    check = the_only_finding(check_devices(without, DRIVER, HOST, "auto", 1))
    assert (check.status, check.name) == ("warning", "driver") and "torch was built without CUDA" in check.found
    assert "failed" in {check.status for check in check_devices(without, DRIVER, HOST, "cuda", 1)}


def hiding(devices: str) -> Host:
    return replace(HOST, variables={"CUDA_VISIBLE_DEVICES": devices})


def test_more_ranks_than_devices() -> None:
    check = the_only_finding(check_devices(READING, DRIVER, HOST, "auto", 4))
    assert check.status == "failed" and check.found.startswith("--tp 4 needs 4 CUDA devices, but torch sees 2")
    assert "give --tp 2 or less" in check.way_out


def test_ranks_on_a_slow_way_and_ranks_that_failed() -> None:
    sizes = [Size(num_bytes=8192, seconds=1e-4, bus_bytes_per_s=8e7), Size(num_bytes=2**26, seconds=0.1, bus_bytes_per_s=6.7e8)]
    trial = Trial(failure="", num_ranks=2, devices=["cuda:0", "cuda:1"], start_s=9.0, sizes=sizes)
    assert check_ranks(trial, on_cuda=False).status == "ok"
    slow = check_ranks(trial, on_cuda=True)
    assert slow.status == "warning" and "8 KiB take 0.100 ms, 64 MiB go at 0.67 GB/s" in slow.found
    broken = check_ranks(replace(trial, failure="rank 1 is late"), on_cuda=True)
    assert broken.status == "failed" and broken.found == "rank 1 is late" and "NCCL_P2P_DISABLE=1" in broken.way_out


TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\tSYS\tPXB\t0-31\t0\t\tN/A
GPU1\tNV12\t X \tPHB\tPXB\t0-31\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPXB\tPXB\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""


def test_the_table_of_nvidia_smi_is_read() -> None:
    assert parse_topology(TOPOLOGY) == {"0-1": "NV12", "0-2": "SYS", "1-2": "PHB"}
    assert parse_topology("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.") == {}
