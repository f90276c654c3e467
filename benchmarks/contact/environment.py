"""What is there: card, driver, versions, memory, topology; and that torch computes on the card at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from importlib.util import find_spec

import torch

from benchmarks.contact.isolated import CheckError
from benchmarks.contact.setting import Setting
from benchmarks.gpu.report import machine
from vlserve.kernels.with_triton import runs_triton
from vlserve.plan.host_memory import available_memory

NEEDED = ("triton", "timm", "tokenizers", "safetensors", "jinja2", "PIL", "transformers", "msgspec", "zmq", "fastapi", "xgrammar")
ASKED = (["nvidia-smi"], ["nvidia-smi", "topo", "-m"], ["nvidia-smi", "-q", "-d", "CLOCK,POWER,ECC,TEMPERATURE"])
SMI_LIMIT_S = 5


def environment(setting: Setting) -> None:
    with setting.device():
        begun = time.monotonic()
        if not torch.cuda.is_available():
            raise CheckError("torch sees no CUDA device")
        device = torch.device("cuda", torch.cuda.current_device())
        x = torch.ones(64, 64, device=device)
        if float((x @ x).sum()) != 64**3:
            raise CheckError("torch's product of ones is wrong")
        if not runs_triton(x):
            raise CheckError("there is no Triton")
        seconds = time.monotonic() - begun
        free, total = torch.cuda.mem_get_info(device)
        setting.found(**machine(device))
        setting.found(free_bytes=free, total_bytes=total, first_product_s=round(seconds, 2), devices=torch.cuda.device_count())
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    setting.found(cpus=os.cpu_count(), available_bytes=int(available_memory()), nccl=str(nccl), shm=_shared_memory())
    setting.found(missing=[name for name in NEEDED if _is_missing(name)])
    for command in ASKED if shutil.which("nvidia-smi") else ():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_LIMIT_S)
            print(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}")
        except subprocess.TimeoutExpired:
            setting.found(warning=f"{' '.join(command)} did not end within {SMI_LIMIT_S} s")


def _is_missing(name: str) -> bool:
    try:
        found = find_spec(name)
    except ModuleNotFoundError:
        return True
    return found is None or "stand_ins" in str(found.origin)


def _shared_memory() -> int | None:
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
