"""Findings about the driver, the devices and the ways between them; pure functions over readings."""

from __future__ import annotations

from itertools import combinations

from vlserve.doctor.checks import GIB, Check, failed, ok, warning
from vlserve.doctor.driver import Driver, Gpu
from vlserve.doctor.host import Host
from vlserve.doctor.probe import Device, Reading, Torch

# the oldest driver for each major version of CUDA: NVIDIA's table "CUDA Toolkit and Minimum Required Driver Versions"
MIN_DRIVER = {11: "450", 12: "525", 13: "580"}
FREE_SHARE = 0.9  # of a device's memory, the default of --gpu-memory-utilization
INSTALL = "https://pytorch.org/get-started/locally"


def check_devices(reading: Reading, driver: Driver, host: Host, device: str, tp: int) -> list[Check]:
    """`device` is as given: auto, cpu or cuda."""
    if reading.torch is None:
        way_out = "install torch again; if it is only slow, raise --timeout"
        return [failed("torch", f"torch does not start: {reading.error}", way_out)]
    checks = [_torch(reading.torch, tp), _driver(reading.torch, driver, device), _devices(reading, driver, host, device, tp)]
    if runs_on_cuda(reading, device) and checks[-1].status != "failed":
        checks.append(_memory(reading, driver, tp))
        if tp > 1:
            checks += [_topology(reading, driver, tp), _copies(reading, host)]
    return checks


def runs_on_cuda(reading: Reading, device: str) -> bool:
    return device != "cpu" and reading.torch is not None and reading.torch.num_devices > 0


def _torch(torch: Torch, tp: int) -> Check:
    found = f"{torch.version}, built for {f'CUDA {torch.cuda}' if torch.cuda else 'the CPU'}"
    found += f", NCCL {torch.nccl}" if torch.nccl else ""
    lacks = "Gloo" if not torch.has_gloo else "NCCL" if torch.num_devices and torch.nccl is None else ""
    if lacks and tp > 1:
        return failed("torch", f"{found}, without {lacks}", f"ranks talk through it; install one that has it ({INSTALL})")
    return ok("torch", found)


def _driver(torch: Torch, driver: Driver, device: str) -> Check:
    name = "driver"
    bad = warning if device == "cpu" else failed  # nobody asked for a GPU
    if driver.error:
        way_out = "after an update of the driver restart the machine; give a container its GPUs (docker run --gpus all)"
        return bad(name, f"the NVIDIA driver does not answer: {driver.error}", way_out)
    if driver.version is None:
        return ok(name, "no NVIDIA driver")
    newest = f"{driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else "?"
    found = f"NVIDIA {driver.version}, for CUDA up to {newest}"
    if torch.cuda is None:
        return (failed if device == "cuda" else warning)(
            *(name, f"{found}, but torch was built without CUDA", f"install a torch with CUDA ({INSTALL})")
        )
    major = int(torch.cuda.partition(".")[0])
    # with NVIDIA's compatibility package an old driver runs a newer CUDA; then torch sees devices
    if driver.cuda is not None and driver.cuda[0] < major and not torch.num_devices:
        needed = f"update the driver to {MIN_DRIVER[major]} or newer" if major in MIN_DRIVER else "update the driver"
        way_out = f"{needed}, or install a torch built for CUDA {driver.cuda[0]} ({INSTALL}), or give --device cpu"
        return bad(name, f"{found}, is too old for torch's CUDA {torch.cuda}", way_out)
    return ok(name, found)


def _devices(reading: Reading, driver: Driver, host: Host, device: str, tp: int) -> Check:
    name, torch = "devices", reading.torch
    assert torch is not None
    visible = host.variables.get("CUDA_VISIBLE_DEVICES")
    if not runs_on_cuda(reading, device):
        if device == "cpu":
            return ok(name, "the CPU, as asked for")
        why = torch.complaint or (f"CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else "")
        found = "torch sees no CUDA device" + (f" ({why})" if why else "")
        if device == "cuda":
            return failed(name, found, "use --device cpu, or see that nvidia-smi lists the GPUs")
        if driver.gpus and torch.cuda is not None:
            return failed(
                name, f"{found}, but the driver has {len(driver.gpus)}", "check CUDA_VISIBLE_DEVICES, or give --device cpu"
            )
        return ok(name, "the CPU; " + found)
    if torch.num_devices < tp:
        found = f"--tp {tp} needs {tp} CUDA devices, but torch sees {torch.num_devices}"
        way_out = f"give --tp {torch.num_devices} or less, check CUDA_VISIBLE_DEVICES, or use more machines (--nnodes)"
        return failed(name, f"{found} ({_names(reading.devices)})", way_out)
    for entry in reading.devices:
        if entry.error:
            way_out = "look at nvidia-smi and dmesg; leave the device out with CUDA_VISIBLE_DEVICES"
            if not is_built_for(entry, torch.architectures):
                way_out = f"this torch was built for {', '.join(torch.architectures)}; install one for this device ({INSTALL})"
            major, minor = entry.capability
            return failed(name, f"device {entry.index} ({entry.name}, capability {major}.{minor}): {entry.error}", way_out)
    if len(reading.devices) < torch.num_devices:
        way_out = "look at nvidia-smi and dmesg; a GPU or its driver hangs"
        return failed(name, f"device {len(reading.devices)} does not answer: {reading.error}", way_out)
    used = reading.devices[:tp]
    if len({(entry.name, entry.total_bytes) for entry in used}) > 1:
        return warning(name, _names(used), "ranks wait for the slowest; choose equal ones with CUDA_VISIBLE_DEVICES")
    return ok(name, _names(used) + (f" of {torch.num_devices}" if torch.num_devices > tp else ""))


def is_built_for(device: Device, architectures: list[str]) -> bool:
    """Code of the same major version runs (sm_), and code that the driver still translates (compute_)."""
    for entry in architectures:
        kind, _, digits = entry.partition("_")
        number = digits.rstrip("af")  # sm_90a: one architecture only, which is never older than itself
        capability = (int(number[:-1]), int(number[-1]))
        if capability <= device.capability and (kind == "compute" or capability[0] == device.capability[0]):
            return True
    return False


def _memory(reading: Reading, driver: Driver, tp: int) -> Check:
    name, used, users = "device memory", reading.devices[:tp], []
    for entry in used:
        gpu = _gpu(entry, driver)
        for process in gpu.processes if gpu else []:
            size = "" if process.used_bytes is None else f" with {process.used_bytes / GIB:.1f} GiB"
            users.append(f"process {process.pid} on device {entry.index}{size}")
    found = ", ".join(f"{e.free_bytes / GIB:.1f} of {e.total_bytes / GIB:.1f} GiB free" for e in used)
    found += f"; {', '.join(users)}" if users else ""
    if users or any(entry.free_bytes < FREE_SHARE * entry.total_bytes for entry in used):
        way_out = "end what uses the devices, choose others (CUDA_VISIBLE_DEVICES), or lower --gpu-memory-utilization"
        return warning(name, found, way_out)
    return ok(name, found)


def _topology(reading: Reading, driver: Driver, tp: int) -> Check:
    name = "topology"
    kinds: dict[str, list[str]] = {}
    for one, other in combinations(reading.devices[:tp], 2):
        gpus = _gpu(one, driver), _gpu(other, driver)
        if gpus[0] is None or gpus[1] is None:
            continue
        low, high = sorted((gpus[0].index, gpus[1].index))
        link = driver.links.get(f"{low}-{high}", "")
        kinds.setdefault(_kind(link), []).append(f"{one.index}-{other.index}")
    if not kinds or set(kinds) == {""}:
        return ok(name, "not known: nvidia-smi topo -m does not tell")
    found = "; ".join(f"{kind} between {_pairs(pairs, tp)}" for kind, pairs in kinds.items())
    if any("across sockets" in kind for kind in kinds):
        return warning(name, found, "choose devices of one socket with CUDA_VISIBLE_DEVICES where there are enough")
    return ok(name, found)


def _kind(link: str) -> str:
    """In words, what nvidia-smi's legend says."""
    if link.startswith("NV"):
        return f"NVLink ({link})"
    words = {"PIX": "PCIe", "PXB": "PCIe", "PHB": "PCIe through the CPU", "NODE": "PCIe through the CPU"}
    return "PCIe across sockets (SYS)" if link == "SYS" else f"{words[link]} ({link})" if link in words else link


def _copies(reading: Reading, host: Host) -> Check:
    name = "peer access"
    is_off = host.variables.get("NCCL_P2P_DISABLE") == "1"
    bad = warning if is_off else failed  # the ranks do not use it
    way_out = "set NCCL_P2P_DISABLE=1, or turn ACS off in the BIOS and the IOMMU to passthrough (kernel option iommu=pt)"
    wrong = [f"{copy.source} to {copy.target}" for copy in reading.copies if not copy.is_right]
    if wrong:
        return bad(name, f"copies between devices give wrong bytes: {', '.join(wrong)}", way_out)
    if reading.stuck is not None:
        found = f"a copy from device {reading.stuck.source} to {reading.stuck.target} failed: {reading.error}"
        return bad(name, found, way_out)
    if reading.error:
        return bad(name, f"copies could not be tried: {reading.error}", way_out)
    without = [f"{copy.source} to {copy.target}" for copy in reading.copies if not copy.has_access]
    if without:
        found = f"copies are right; no direct access from {', '.join(without)}"
        return warning(name, found, "NCCL goes through the host's memory there, which is slower; usual for GPUs without NVLink")
    return ok(name, f"{len(reading.copies)} directions, all direct, and copies are right")


def _gpu(device: Device, driver: Driver) -> Gpu | None:
    return next((gpu for gpu in driver.gpus if device.uuid and gpu.uuid.endswith(device.uuid)), None)


def _names(devices: list[Device]) -> str:
    labels = [f"{d.name} (capability {d.capability[0]}.{d.capability[1]})" for d in devices]
    return ", ".join(f"{labels.count(label)} x {label}" for label in dict.fromkeys(labels))


def _pairs(pairs: list[str], tp: int) -> str:
    everyone = tp * (tp - 1) // 2
    return "all" if len(pairs) == everyone and tp > 2 else ", ".join(pairs)
