"""The tuner keeps the fastest launch of those that are right, and writes one architecture's table; its timer is a fake here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vlserve.kernels.int4_pairs import launch as launching
from vlserve.kernels.int4_pairs.launch import CARD, ROWS, TABLE, Launch, launches
from vlserve.kernels.measure import Difference, by_outputs, difference
from vlserve.kernels.tune import Problem, RefusedError, candidates, formatted, list_candidates, main, problems, tune, write_table

WANTED = Launch(block_t=16, block_n=128, warps=4, stages=3, waves=4)


def test_candidates_divide_their_class_and_fit() -> None:
    for rows in ROWS:
        found = candidates(rows)
        assert len(found) == len(set(found)) > 50
        assert all(rows % launch.block_t == 0 and launch.block_t * 4 >= rows for launch in found)
        assert all(launch.stages * (64 * launch.block_n + 256 * launch.block_t) <= 99 * 1024 for launch in found)
    assert set(candidates(64, 2 * 99 * 1024)) > set(candidates(64)), "more shared memory, more to try"
    kept = {launch for table in launches().values() for launch in table.values()}
    assert kept <= {launch for rows in ROWS for launch in candidates(rows, 227 * 1024)}, "what the table has is tried too"


def test_the_fastest_right_launch_is_kept() -> None:
    asked: list[tuple[Problem, Launch, int]] = []

    def measure(problem: Problem, launch: Launch, parts: int) -> float:
        asked.append((problem, launch, parts))
        if launch.warps == 2:
            raise RefusedError("the result is wrong: relative 1.0e+00, largest 9.0e+00")
        distance = abs(launch.block_n - WANTED.block_n) + abs(launch.warps - WANTED.warps) + abs(launch.stages - WANTED.stages)
        return 1e-6 * (1 + distance + abs(launch.block_t - 16) + (launch.registers or 0) / 100 + parts / 100)

    said: list[str] = []
    found = tune(measure, 132, in_use=launches()["sm_90"], say=said.append)
    assert set(found) == {f"{rows} {width}" for rows in ROWS for width in ("narrow", "wide")}
    for launch in (found["16 narrow"], found["16 wide"], found["32 wide"]):
        assert (launch.block_t, launch.block_n, launch.warps, launch.stages, launch.registers) == (16, 128, 4, 3, None)
    assert found["16 narrow"].waves == 1, "the fewest parts were the fastest"
    assert len(asked) == len({(problem, launch.block_t, launch.block_n, launch.warps, launch.stages, launch.registers, parts)
                              for problem, launch, parts in asked}), "nothing is timed twice"  # fmt: skip
    assert sum("1 kinds of refusals" in line for line in said) == 8


def test_no_right_launch_is_an_error() -> None:
    def refuse(problem: Problem, launch: Launch, parts: int) -> float:
        raise RefusedError("OutOfResources: shared memory")

    with pytest.raises(RuntimeError, match="class '16 narrow': none of .* OutOfResources"):
        tune(refuse, 132, in_use=launches()["sm_90"], say=lambda line: None)


@pytest.mark.parametrize("end,classes", [(1, ["16 narrow"]), (300, ["16 narrow", "16 wide"]), (0, [])])
def test_what_was_found_before_the_end_is_kept(end: int, classes: list[str]) -> None:
    """The launch in use is tried first, so that a class that was begun is not worse than before."""
    tried: list[Launch] = []

    def measure(problem: Problem, launch: Launch, parts: int) -> float:
        if not tried or tried[-1] != launch:
            tried.append(launch)
        return 1.0 if launch.stages == 2 else 2.0

    in_use = launches()["sm_90"]
    begun = iter(range(end))
    found = tune(measure, 132, in_use=in_use, is_over=lambda: next(begun, None) is None, say=lambda line: None)
    assert list(found) == classes and (not classes or tried[0] == in_use["16 narrow"])
    if end == 1:
        assert found == {"16 narrow": in_use["16 narrow"]}
    elif classes:
        assert found["16 narrow"].stages == 2, "all were tried"


def test_the_problems_are_of_their_class() -> None:
    for rows in ROWS:
        for width in ("narrow", "wide"):
            for problem in problems(rows, width):
                assert rows / 2 < problem.rows <= rows or (rows, problem.rows) == (16, 1)
                assert (problem.outputs >= launching.WIDE) == (width == "wide")


def test_writing_a_table_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(TABLE.read_text())
    assert formatted(before) == TABLE.read_text(), "a table that is written again is the same file"
    found = dict.fromkeys(launches()["sm_90"], WANTED)
    for architecture in ("sm_90", "sm_120"):
        write_table(tmp_path / "launch.json", architecture, "NVIDIA H200", found)
    after = json.loads((tmp_path / "launch.json").read_text())
    assert {name: after[name] for name in ("sm_80", "sm_100")} == {name: before[name] for name in ("sm_80", "sm_100")}
    assert after["sm_90"][CARD] == after["sm_120"][CARD] == "NVIDIA H200"
    monkeypatch.setattr(launching, "TABLE", tmp_path / "launch.json")
    assert launches.__wrapped__()["sm_120"] == found, "and it is read as it was found"


def test_without_a_gpu_it_lists_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    list_candidates(None, said.append)
    assert sum(line.startswith("  Launch(") for line in said) == sum(len(candidates(rows)) for rows in ROWS)
    assert "nothing was compiled" in said[-1]
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main([])
        assert "needs a CUDA device" in capsys.readouterr().err


def test_differences() -> None:
    want = torch.randn(40, 50, dtype=torch.float64)
    rounded = difference(want.bfloat16(), want)
    assert 1e-3 < rounded.relative < 2.5e-3 and rounded.largest == 0 and rounded.within(Difference(4e-3, 0.03))
    off = want.bfloat16()
    off[3, 4] += 1
    assert difference(off, want).largest > 0.5 and not difference(off, want).within(Difference(0.1, 0.03))
    off[3, 4] = float("nan")
    assert not difference(off, want).within(Difference(1e9, 1e9))
    with pytest.raises(ValueError, match="40, 50"):
        difference(want, want[:1])


def test_pieces_are_the_whole() -> None:
    a, b = torch.randn(10, 3), torch.randn(10, 2)
    got = by_outputs(lambda a, b: a.sum(1)[None] + b.sum(1)[None], a, b, step=4)
    assert torch.equal(got, (a.sum(1) + b.sum(1))[None])
