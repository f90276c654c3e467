"""What torch sees, and copies between the devices, in a process of its own: `python -m vlserve.doctor.probe`.

Of its own, because a broken driver may hang or kill whoever asks, and because asking takes memory on every device. The process
writes one JSON document a line as it goes, so that what was found before it stood still is known.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import torch

COPY_BYTES, COPIES = 2**24, 3  # size of one copy; copies of each pair, with different contents
KILL_S = 5.0


class Torch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    version: str
    cuda: str | None  # that it was built for
    nccl: str | None
    has_gloo: bool
    architectures: list[str]  # sm_90, compute_120, ...
    num_devices: int
    complaint: str  # what torch said when it was asked for devices


class Device(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """As torch counts them, after CUDA_VISIBLE_DEVICES. `error`: what became of a first computation there."""

    index: int
    name: str
    uuid: str
    capability: tuple[int, int]
    total_bytes: int = 0
    free_bytes: int = 0
    error: str = ""


class Begun(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Written before a copy, which may hang."""

    source: int
    target: int


class Copy(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    source: int
    target: int
    has_access: bool  # directly, without a copy in the host's memory
    is_right: bool


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """`torch` is None when it cannot be imported; `error` says why the process did not come to its end."""

    torch: Torch | None = None
    devices: list[Device] = []
    copies: list[Copy] = []
    stuck: Begun | None = None  # the copy that did not end
    error: str = ""


Line = Torch | Device | Begun | Copy


def probe(*, cuda: bool, num_devices: int, timeout_s: float) -> Reading:
    """Asks torch in another process, which ends within `timeout_s`; copies are tried among the first `num_devices`."""
    root = str(Path(__file__).parent.parent.parent)
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
    arguments = ["cuda" if cuda else "cpu", str(num_devices), str(int(timeout_s) + 5)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "vlserve.doctor.probe", *arguments],
            env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
        )
        try:
            status: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver dies when the driver lets it
                process.wait(KILL_S)
        out.seek(0)
        errors.seek(0)
        return read_lines(out.read(), _explain(status, errors.read(), timeout_s))


def _explain(status: int | None, errors: bytes, timeout_s: float) -> str:
    """Why the process did not come to its end; "" when it did."""
    if status is None:
        return f"no answer within {timeout_s:.0f} s"
    last = errors.decode(errors="replace").strip().rpartition("\n")[2]
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return "" if status == 0 else last or f"the process ended ({how})"


def read_lines(out: bytes, error: str) -> Reading:
    decoder = msgspec.json.Decoder(Line)
    lines = [decoder.decode(line) for line in out.splitlines(keepends=True) if line.startswith(b"{") and line.endswith(b"\n")]
    last = lines[-1] if lines else None
    return Reading(
        torch=next((line for line in lines if isinstance(line, Torch)), None),
        devices=[line for line in lines if isinstance(line, Device)],
        copies=[line for line in lines if isinstance(line, Copy)],
        stuck=last if isinstance(last, Begun) else None,
        error=error,
    )


def main() -> None:
    where, num_devices, limit_s = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    signal.alarm(limit_s)  # the end also when nobody is left to end it
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        import torch
        import torch.distributed as dist

        count = torch.cuda.device_count() if where == "cuda" and torch.cuda.is_available() else 0
    _tell(
        Torch(
            version=str(torch.__version__),
            cuda=torch.version.cuda,
            nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda and dist.is_nccl_available() else None,
            has_gloo=dist.is_gloo_available(),
            architectures=torch.cuda.get_arch_list() if count else [],
            num_devices=count,
            complaint=next((str(c.message) for c in complaints if "cuda" in str(c.message).lower()), ""),
        )
    )
    devices = [_try_device(index) for index in range(count)]
    if count < num_devices or any(device.error for device in devices):
        return
    for source in range(num_devices):
        for target in range(num_devices):
            if source != target:
                _tell(Begun(source=source, target=target))
                _tell(_try_copy(source, target))


def _try_device(index: int) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free = total = 0
    error = ""
    try:
        free, total = torch.cuda.mem_get_info(index)  # before this process takes anything else
        if float(torch.ones(1024, device=f"cuda:{index}").sum()) != 1024:
            error = "1024 ones do not add up to 1024"
    except RuntimeError as problem:
        error = str(problem).partition("\n")[0]
    device = Device(
        index=index,
        name=properties.name,
        uuid=str(getattr(properties, "uuid", "")),
        capability=(properties.major, properties.minor),
        total_bytes=total,
        free_bytes=free,
        error=error,
    )
    _tell(device)
    return device


def _try_copy(source: int, target: int) -> Copy:
    """Different contents each time, into memory that holds something else, compared on the target."""
    import torch

    is_right = True
    for turn in range(COPIES):
        there = torch.full((COPY_BYTES // 4,), -1, dtype=torch.int32, device=f"cuda:{target}")
        there.copy_(_pattern(turn, f"cuda:{source}"))
        for device in (source, target):
            torch.cuda.synchronize(device)
        is_right &= torch.equal(there, _pattern(turn, f"cuda:{target}"))
    return Copy(source=source, target=target, has_access=torch.cuda.can_device_access_peer(target, source), is_right=is_right)


def _pattern(turn: int, device: str) -> torch.Tensor:
    import torch

    return torch.arange(COPY_BYTES // 4, dtype=torch.int32, device=device) * (2 * turn + 3) + turn


def _tell(line: Line) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
