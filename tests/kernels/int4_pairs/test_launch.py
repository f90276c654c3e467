"""The table of launches is whole, and splits lose no input and keep a device busy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlserve.kernels.int4_pairs.launch import FALLBACK, ROWS, WIDE, Launch, choose, fitted, launches, split

CLASSES = {f"{rows} {width}" for rows in ROWS for width in ("narrow", "wide")}


def test_every_architecture_has_every_class() -> None:
    assert {"sm_80", "sm_90", "sm_100"} <= set(launches()) and FALLBACK in launches()
    for table in launches().values():
        assert set(table) == CLASSES
        assert all(int(name.split()[0]) % launch.block_t == 0 for name, launch in table.items())


def test_classes_end_where_they_say() -> None:
    table = launches()["sm_90"]
    for rows, name in ((1, "16"), (16, "16"), (17, "32"), (33, "64"), (64, "64"), (65, "128"), (128, "128"), (500, "128")):
        assert choose("sm_90", rows, WIDE - 1, torch.bfloat16) == table[f"{name} narrow"]
        assert choose("sm_90", rows, WIDE, torch.bfloat16) == table[f"{name} wide"]


def test_an_unknown_architecture_is_launched_as_the_oldest() -> None:
    assert choose("sm_1", 1, 64, torch.float16) == launches()[FALLBACK]["16 narrow"]


def test_float16_has_half_the_rows_where_registers_are_short() -> None:
    full = Launch(block_t=64, block_n=128, warps=4, stages=3, waves=1)
    assert fitted(full, torch.bfloat16) == full and fitted(full, torch.float16) == replace(full, block_t=32)
    for roomy in (replace(full, warps=8), replace(full, block_n=64), replace(full, block_t=32, warps=2)):
        assert fitted(roomy, torch.float16) == roomy


@pytest.mark.parametrize("blocks", (1, 3, 7, 38, 231))
@pytest.mark.parametrize("programs", (1, 14, 64, 592))
def test_no_part_is_empty(programs: int, blocks: int) -> None:
    for launch in launches()["sm_90"].values():
        parts = split(launch, programs, blocks, 132)
        each = -(-blocks // parts)
        assert 1 <= parts <= blocks and (parts - 1) * each < blocks <= parts * each


def test_a_split_fills_the_device_evenly() -> None:
    launch = Launch(block_t=16, block_n=64, warps=2, stages=4, waves=4)
    assert split(launch, 592, 32, 132) == 2, "one part would leave 0.5 of the last of 4.5 rounds idle, two leave nearly nothing"
    assert split(launch, 66, 32, 132) == 8, "four programs a multiprocessor"
    assert split(launch, 1, 32, 132) == 8, "at least four blocks a part"
    assert split(launch, 5280, 32, 132) == 1, "full without"
