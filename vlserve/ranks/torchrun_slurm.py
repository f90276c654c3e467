"""Which of several machines this is, as torchrun or Slurm's srun say it in the environment.

Under both, vlserve is started once for a machine and starts that machine's ranks itself; of several processes on one machine the
first does so and the others end at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

SLURM_PORTS = range(20000, 30000)  # below the ports that systems give to outgoing connections


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One of `nnodes`; `local_rank` is this process among those that the launcher started here."""

    launcher: str
    nnodes: int
    node_rank: int
    rdzv_endpoint: str
    local_rank: int


def find_machine(environment: Mapping[str, str]) -> Machine | None:
    """None when neither started this process, or only on one machine and once."""
    machine = _torchrun(environment) or _slurm(environment)
    if machine is None or (machine.nnodes == 1 and machine.local_rank == 0):
        return None
    return machine


def _torchrun(environment: Mapping[str, str]) -> Machine | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    port = int(environment["MASTER_PORT"]) + 1  # on the port itself torchrun has a store of its own
    return Machine(
        launcher="torchrun",
        nnodes=int(environment["GROUP_WORLD_SIZE"]),
        node_rank=int(environment["GROUP_RANK"]),
        rdzv_endpoint=f"{environment['MASTER_ADDR']}:{port}",
        local_rank=int(environment["LOCAL_RANK"]),
    )


def _slurm(environment: Mapping[str, str]) -> Machine | None:
    """Within an allocation but outside of srun there is no SLURM_STEP_NODELIST."""
    hosts = environment.get("SLURM_STEP_NODELIST")
    if hosts is None:
        return None
    port = SLURM_PORTS[int(environment["SLURM_JOB_ID"]) % len(SLURM_PORTS)]
    return Machine(
        launcher="srun",
        nnodes=int(environment["SLURM_STEP_NUM_NODES"]),
        node_rank=int(environment["SLURM_NODEID"]),
        rdzv_endpoint=f"{_first_host(hosts)}:{port}",
        local_rank=int(environment["SLURM_LOCALID"]),
    )


def _first_host(hosts: str) -> str:
    """Of a list as Slurm writes it: gpu[03-05,9],login1 begins with gpu03."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", hosts)
    assert match is not None, f"SLURM_STEP_NODELIST is {hosts!r}"
    return "".join(part or "" for part in match.groups())
