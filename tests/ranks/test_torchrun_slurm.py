"""What torchrun and Slurm say of several machines, and that two machines answer like one."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.vision.test_preprocess import noise
from vlserve import ConfigError, EngineConfig, VLPipeline
from vlserve.ranks.torchrun_slurm import find_machine

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "GROUP_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}


def test_torchrun_says_which_machine_this_is() -> None:
    machine = find_machine(TORCHRUN)
    assert machine is not None
    assert (machine.nnodes, machine.node_rank, machine.rdzv_endpoint, machine.local_rank) == (2, 1, "node0:29501", 0)
    second = find_machine(TORCHRUN | {"GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0", "LOCAL_RANK": "1"})
    assert second is not None and second.local_rank == 1


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu[03-04]", "gpu03"), ("gpu3,gpu4", "gpu3"), ("a1", "a1"), ("gpu[3,7-9],login1", "gpu3"), ("rack[1-2]n4", "rack1n4")],
)
def test_slurm_says_which_machine_this_is(hosts: str, first: str) -> None:
    machine = find_machine(SLURM | {"SLURM_STEP_NODELIST": hosts})
    assert machine is not None
    assert (machine.nnodes, machine.node_rank, machine.rdzv_endpoint) == (2, 1, f"{first}:23456")


def test_one_machine_is_nothing_special() -> None:
    assert find_machine({}) is None
    assert find_machine({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "gpu[1-4]"}) is None  # an allocation, outside of srun
    assert find_machine(SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 3, "nnodes": 2}, "tp 3 ranks cannot be shared evenly by 2 machines"),
        ({"tp": 2, "nnodes": 2, "node_rank": 2, "rdzv_endpoint": "a:1"}, "node_rank is 2; expected 0 to 1"),
        ({"tp": 2, "nnodes": 2}, "rdzv_endpoint is None; several machines need HOST:PORT"),
        ({"tp": 2, "nnodes": 2, "rdzv_endpoint": "host"}, "rdzv_endpoint is 'host'"),
        ({"tp": 2, "nnodes": 2, "rdzv_endpoint": "host:99999"}, "rdzv_endpoint is 'host:99999'"),
    ],
)
def test_wrong_options_name_the_value(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)  # type: ignore[arg-type]


def test_only_machine_0_answers(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="node_rank is 1: only machine 0 answers"):
        VLPipeline(str(checkpoint("qwen2")), tp=2, nnodes=2, node_rank=1, rdzv_endpoint="127.0.0.1:1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("tp", [2, 4])
def test_two_machines_answer_like_one(checkpoint: Callable[..., Path], tp: int) -> None:
    folder = str(checkpoint("qwen2", num_attention_heads=8, num_key_value_heads=4, hidden_size=64))
    options = {"dtype": "float32", "kv_cache_gib": 0.05}
    pictures = [Image.fromarray(noise(60 + 30 * i, 30, seed=i)) for i in range(3)]
    questions = [("What shape is it?", picture) for picture in pictures] + ["no picture", ("both", pictures[:2])]
    with VLPipeline(folder, threads=1, **options) as pipe:
        want = [answer.token_ids for answer in pipe(questions, max_tokens=8)]
    endpoint = f"127.0.0.1:{free_port()}"
    flags = ["--tp", str(tp), "--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", endpoint]
    flags += ["--dtype", "float32", "--kv-cache-gib", "0.05", "--threads", "1"]
    other = subprocess.Popen([sys.executable, "-m", "vlserve", "serve", folder, *flags], stdout=-1, stderr=-2, text=True)
    try:
        with VLPipeline(folder, tp=tp, nnodes=2, rdzv_endpoint=endpoint, threads=1, **options) as pipe:
            assert [answer.token_ids for answer in pipe(questions, max_tokens=8)] == want
        said, _ = other.communicate(timeout=30)
    finally:
        other.kill()
    assert other.returncode == 0, said
    assert "machine 1 of 2" in said and "machine 0 has ended" in said
