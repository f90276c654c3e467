"""The first contact with a GPU as far as a CPU goes: its parts, their processes and limits, and what it keeps."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from benchmarks.contact.asking import Comparison, Token
from benchmarks.contact.kernels import real_cases
from benchmarks.contact.record import Record, Result
from benchmarks.contact.timings import cases
from benchmarks.gpu.sizes import MODELS
from vlserve.vision.pixels import Unit

ROOT = Path(__file__).parents[2]
# a machine that has torch, Triton, timm and transformers, and no more of what a server needs
BARE = """
import sys
from importlib.machinery import PathFinder

class Bare:
    names = {"msgspec", "zmq", "fastapi", "uvicorn", "starlette", "pydantic", "httpx2", "httpcore2", "xgrammar", "openai"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            found = PathFinder.find_spec(name, path or [one for one in sys.path if "site-packages" not in one])
            if found is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return found

sys.meta_path.insert(0, Bare())
"""
# parts that take no time, in place of those of a GPU; what they do is told by files
PARTS = """
import os, subprocess, sys, time
sys.path.insert(0, {root!r})
from benchmarks import gpu_contact
from benchmarks.contact import parts
from benchmarks.contact.isolated import CheckError

def environment(setting): setting.found(card="none")
def good(setting): setting.found(what="good", value=1)
def bad(setting):
    setting.found(what="before")
    raise CheckError("seven is not eight\\nand more")
def dies(setting): os.abort()
def hangs(setting):
    setting.found(what="begun", child=subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)

gpu_contact.load = lambda parts: ""
names = [environment, good, bad, dies, hangs]
sources = dict.fromkeys(["good", "bad", "dies", "hangs"], ("README.md",)) | {{"environment": ()}}
parts.PARTS = tuple(parts.Part(one.__name__, {limit}, "", f"__main__:{{one.__name__}}", sources[one.__name__]) for one in names)
"""


def run_parts(kept: Path, *calls: list[str], limit: float = 1.0) -> subprocess.Popen[str]:
    """`calls`: the arguments of each run, one after another in one process."""
    code = (
        PARTS.format(root=str(ROOT), limit=limit)
        + f"print([gpu_contact.main([*one, '--kept', {str(kept)!r}]) for one in {calls!r}])"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {one["part"]: one for one in json.loads((folder / "summary.json").read_text())["parts"]}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(pid: int) -> bool:
    until = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not is_running(pid)


def test_what_fails_or_hangs_stops_nothing_and_what_passed_is_passed_over(tmp_path: Path) -> None:
    out = [str(tmp_path / name) for name in ("first", "second", "third")]
    calls = (
        ["--out", out[0]],
        ["--out", out[1], "--only", "good", "bad"],
        ["--out", out[2], "--only", "good", "--again", "good"],
    )
    done = run_parts(tmp_path, *calls)
    printed, _ = done.communicate(timeout=60)
    assert printed.splitlines()[-1] == "[1, 1, 0]", printed
    first = results(tmp_path / "first")
    assert {name: one["status"] for name, one in first.items()} == {
        "environment": "passed",
        "good": "passed",
        "bad": "failed",
        "dies": "failed",
        "hangs": "out of time",
    }
    assert first["good"]["rows"] == [{"what": "good", "value": 1}]
    assert first["bad"]["reason"] == "seven is not eight" and first["bad"]["rows"] == [{"what": "before"}]
    assert first["dies"]["reason"] == "ended by SIGABRT"
    log = (tmp_path / "first/log.txt").read_text()
    assert "in hangs" in log, "where it hung"
    assert ended(first["hangs"]["rows"][0]["child"]), "what it started is ended with it"
    second = results(tmp_path / "second")
    assert second["good"]["status"] == "passed before" and second["good"]["rows"] == first["good"]["rows"]
    assert second["bad"]["status"] == "failed" and second.keys() == {"environment", "good", "bad"}
    assert results(tmp_path / "third")["good"]["status"] == "passed"


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_an_interrupted_run_leaves_what_it_found(tmp_path: Path, number: int) -> None:
    done = run_parts(tmp_path, ["--only", "good", "hangs"], limit=60)
    rows, until = tmp_path / "results/rows.jsonl", time.monotonic() + 60
    while not (rows.exists() and "begun" in rows.read_text()):
        assert done.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.kill(done.pid, number)
    printed, _ = done.communicate(timeout=20)
    assert printed.splitlines()[-1] == "[130]", printed
    found = results(tmp_path / "results")
    assert found["good"]["status"] == "passed"
    assert (found["hangs"]["status"], found["hangs"]["reason"]) == ("failed", "interrupted")
    assert ended(found["hangs"]["rows"][0]["child"])


def test_engines_are_rehearsed_where_nothing_of_a_server_is(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "benchmarks/gpu_contact.py"), "--rehearse", "--kept", str(tmp_path), "--only", "graphs"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "results/log.txt").read_text()[-4000:]
    assert "nothing was timed" in done.stdout
    document = json.loads((tmp_path / "results/summary.json").read_text())
    assert document["stand_ins"] == ["msgspec"] and document["passed"] and document["rehearsed"]
    rows = results(tmp_path / "results")["graphs"]["rows"]
    assert rows[0]["recorded"] and rows[1]["equal"] == 2 and rows[1]["largest_logprob_difference"] < 1e-3
    assert not any("microseconds" in key for row in rows for key in row)


def test_the_parts_fit_into_six_minutes() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_contact.py"), "--list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    limits = [int(line[12:16]) for line in lines]
    assert sum(limits[:-1]) == limits[-1] <= 360 and lines[0].startswith("environment")


def test_every_operation_with_a_kernel_is_among_the_cases() -> None:
    names = {case.kernel.split(",")[0] for case in real_cases()}
    assert names >= {
        *("AWQ product", "AWQ", "AWQ dequantise", "head", "int8 head", "greedy sampling", "sampling with top-k"),
        *(
            "experts' product",
            "attention decode",
            "attention prefill",
            "rms_norm",
            "add_rms_norm",
            "silu_mul",
            "rotary_store",
            "add_scaled_norm",
        ),
    }
    products = [case.kernel for case in cases(MODELS["8b"], 1024)]
    assert products.count("AWQ product") == products.count("16-bit product") == 4


# as in vlserve/engine/batch.py, with what a step's message has: the same classes by either package
MESSAGES = """
class Piece(msgspec.Struct, frozen=True, array_like=True):
    digest: bytes
    runs: list[tuple[int, int]]
    units: list[Unit]

class Message(msgspec.Struct, frozen=True, array_like=True):
    piece: Piece | None
    ids: list[int] = []
    is_last: bool = False

class File(msgspec.Struct):
    added: list[Piece] = []
    vocab: dict[str, int] | list[Any] = {}
    inner: Message = msgspec.field(default_factory=lambda: Message(None))
"""


@pytest.mark.parametrize("package", ("msgspec", "stand-in"))
def test_what_stands_in_for_msgspec_gives_the_same(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "benchmarks/contact/stand_ins/msgspec/__init__.py"
    spec = (
        importlib.util.find_spec("msgspec") if package == "msgspec" else importlib.util.spec_from_file_location("stand_in", path)
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    home = types.ModuleType("messages_of_a_test")
    home.__dict__.update(msgspec=module, Unit=Unit, Any=Any)
    monkeypatch.setitem(sys.modules, home.__name__, home)
    exec(compile("from __future__ import annotations\n" + MESSAGES, "messages", "exec"), home.__dict__)
    message = home.Message(home.Piece(b"\x00\xff", [(1, 2)], [Unit((3, 4), 5)]), [7])
    decoder = module.msgpack.Decoder(home.Message)
    for one in (message, home.Message(None, is_last=True)):
        assert decoder.decode(module.msgpack.Encoder().encode(one)) == one
    changed = module.structs.replace(message, ids=[8])
    assert (changed.ids, changed.piece, message.ids) == ([8], message.piece, [7])
    assert home.Message(None).ids is not home.Message(None).ids
    read = module.json.decode(b'{"vocab": {"a": 1}, "other": [1]}', type=home.File)
    assert (read.vocab, read.added, read.inner) == ({"a": 1}, [], home.Message(None))
    assert module.json.decode(b'{"vocab": [["a", 1]]}', type=home.File).vocab == [["a", 1]]
    for wrong in (b'{"vocab": 3}', b"{"):
        with pytest.raises(module.DecodeError):
            module.json.decode(wrong, type=home.File)
    with pytest.raises(TypeError):
        home.Piece(b"")


def answer(*ids: int, gap: float = 1.0) -> list[Token]:
    return [(id, -0.5, [(id, -0.5), (id + 1, -0.5 - gap)]) for id in ids]


def test_answers_that_part_at_a_tie_are_told_from_those_that_differ() -> None:
    found = Comparison(tie=0.01)
    found.take(0, answer(1, 2), answer(1, 2))
    found.take(1, answer(1, 3), answer(1, 2, gap=0.001))
    found.take(2, answer(1, 3), answer(1, 2))
    found.take(3, answer(1), answer(1, 2))
    assert (found.equal, found.ties, found.tokens) == (1, 1, 5)
    assert [line.split(",")[0].split(":")[0] for line in found.different] == ["answer 2", "answer 3"]


def test_figures_are_printed_as_shares_of_their_floors(tmp_path: Path) -> None:
    row = {"figure": "a step", "microseconds": 12.5, "limit": "memory", "of_measured_floor": 0.8, "of_data_sheet_floor": None}
    record = Record(tmp_path, [Result(part="timings", status="passed", limit_s=40, rows=[row, {"figure": "rates"}])], {})
    assert record.figures().split() == [
        "a",
        "step",
        "12.5",
        "us",
        "80%",
        "of",
        "the",
        "floor",
        "by",
        "measured",
        "rates,",
        "-",
        "by",
        "the",
        "data",
        "sheet's",
        "(memory)",
    ]
    assert record.has_passed and record.table().splitlines()[1].split()[:3] == ["timings", "passed", "0.0"]
