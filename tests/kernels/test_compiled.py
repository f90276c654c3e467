"""What Triton makes of the kernels for A100, H100 and H200, and B200: no spills, wide loads, few instructions a number.

Where more is counted than a case allows, the kernel has become slower, whatever the interpreter says of its results.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.kernels.attention_cases import SPILLS, attention
from tests.kernels.cases import every_case, four_bits
from tests.kernels.compiled import COLUMNS, TEXT
from tests.kernels.machine_code import ALL, Case, Code, compile_all, faults
from vlserve.kernels.int4_pairs import launch as launching
from vlserve.kernels.int4_pairs.launch import Launch, launches
from vlserve.kernels.tune import write_table

pytest.importorskip(
    "triton", minversion="3.8", reason="the caps are those of 3.8's compiler; docs/kernels.md has earlier ones' figures"
)

DOCUMENT = Path(__file__).parents[2] / "docs/kernels.md"
NATIVE_TOO_EARLY = attention("fp16", "e4m3", 128, 1, 80, is_native=True)
CASES = [case for case in every_case() if case.in_suite]


@cache
def counted() -> dict[str, Code | str]:
    """All compiled, once a process."""
    cases = [*CASES, NATIVE_TOO_EARLY]
    return dict(zip((case.label for case in cases), compile_all(cases), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_nothing_is_over_its_cap(case: Case) -> None:
    code = counted()[case.label]
    assert not faults(case, code), code


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "4-bit product"], ids=lambda case: case.label)
def test_products_with_four_bits(case: Case) -> None:
    code, threads = counted()[case.label], 32 * case.options["num_warps"]
    assert isinstance(code, Code)
    assert code.units and "UTCHMMA" not in code.units, "a B200's own units take the weights from another memory, by way of others"
    words, activations = case.constants["BLOCK_N"] * 16 * 4, case.constants["BLOCK_T"] * 128 * 2  # bytes of a turn
    assert code.ahead[128] == (words + activations) // (16 * threads), "weights and activations are asked for by 16 bytes"
    assert not code.waited_for and min(code.ahead) >= 32, "a turn would wait for its scales"


def test_e4m3_is_no_type_of_an_a100() -> None:
    reason = counted()[NATIVE_TOO_EARLY.label]
    assert isinstance(reason, str) and "fp8e4nv" in reason


def test_more_than_allowed_is_told() -> None:
    case = CASES[0]
    code = Code(registers=256, spills=2, looped=1, shared=10**6, widest=64, ahead={64: 1}, waited_for=0, per_number=9.0, units=())
    assert [fault.split()[0] for fault in faults(case, code)] == ["2", "1", "256", "1000000", "loads", "loads", "9.0"]


def test_architectures_that_a_card_was_timed_for_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that Triton does not know yet is refused by itself."""
    narrow = dict.fromkeys(launches()["sm_80"], launches()["sm_80"]["16 narrow"])
    large = Launch(block_t=64, block_n=128, warps=8, stages=2, waves=2)
    for name in ("sm_86", "sm_89", "sm_120", "sm_999"):
        write_table(tmp_path / "launch.json", name, "a card", narrow | {"128 wide": large})
    monkeypatch.setattr(launching, "TABLE", tmp_path / "launch.json")
    launches.cache_clear()
    try:
        cases = [case for case in four_bits() if case.architecture in (86, 89, 120, 999) and case.in_suite]
        assert {case.label for case in cases} <= {case.label for case in every_case()}
    finally:
        launches.cache_clear()
    unknown = next(case for case in cases if case.architecture == 999)
    known = [case for case in cases if case.architecture < 999]
    assert len(known) == 9
    *codes, refused = compile_all([*known, unknown])
    assert not [fault for case, code in zip(known, codes, strict=True) for fault in faults(case, code)]
    assert isinstance(refused, str) and refused


def test_the_document_begins_as_it_is_printed() -> None:
    written = re.search(r"with triton (\S+)\. -->", DOCUMENT.read_text())
    assert written
    begins = TEXT.split("{types}")[0].format(version=written[1], most=ALL, spilling=len(SPILLS))
    assert DOCUMENT.read_text().startswith(begins), "change both: the text in tests/kernels/compiled.py is printed"


def test_the_document_has_every_case() -> None:
    text = DOCUMENT.read_text()
    rows = [
        re.split(r" ?\| ?", line)[1:-1]
        for line in text.split("## All kernels")[1].split("\n## ")[0].splitlines()
        if line.startswith("|")
    ]
    assert tuple(rows[0]) == COLUMNS
    cases = [[c.name, c.dtype, c.setting, f"sm_{c.architecture}"] for c in every_case()]
    assert [row[:4] for row in rows[2:]] == cases, "python -m tests.kernels.compiled > docs/kernels.md"
