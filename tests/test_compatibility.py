"""docs/models.md is what the tests say; that they said it is judged at the end of a run (tests/compatibility.py)."""

from __future__ import annotations

import pytest

from tests import compatibility
from tests.compatibility import PAGE, Recorder, Row, difference, page, read_rows
from tests.published import PUBLISHED

ROWS = {
    Row("OpenGVLab's own", "internlm2", "awq int4", "1"),
    Row("OpenGVLab's own", "internlm2", "awq int4", "2"),
    Row("text model", "qwen3_moe", "dense", "2 --expert-parallel"),
}


def test_the_page_is_its_rows_and_the_published_models() -> None:
    text = PAGE.read_text()
    assert text == page(read_rows(text)), "write it again: python -m tests.compatibility > docs/models.md"
    assert all(f"| {name} |" in text for name in PUBLISHED)


def test_rows_are_read_as_they_are_written() -> None:
    text = page(ROWS)
    assert read_rows(text) == ROWS
    assert "| OpenGVLab's own | `internlm2` | awq int4 | 1, 2 | InternVL2-2B-AWQ, InternVL2-8B-AWQ, InternVL2-26B-AWQ |" in text
    assert "| text model | `qwen3_moe` | dense | 2 --expert-parallel | Qwen3-30B-A3B |" in text


def test_what_differs_is_named() -> None:
    listed = read_rows(PAGE.read_text())
    assert difference(listed, is_whole=True) == difference(set(), is_whole=False) == ""
    new, lost = Row("text model", "qwen9", "dense", "1"), min(listed)
    assert "qwen9" in difference(listed | {new}, is_whole=False) and "is not on it" in difference({new}, is_whole=False)
    assert f"{lost} is on it, and no test showed it" in difference(listed - {lost}, is_whole=True)


def test_rows_of_tests_that_passed_count(request: pytest.FixtureRequest) -> None:
    recorder = Recorder(request.config)

    def report(outcome: str, when: str, *rows: Row) -> None:
        properties = [(compatibility.PROPERTY, [list(row) for row in rows])]
        recorder.pytest_runtest_logreport(
            pytest.TestReport("x", ("x", None, ""), {}, outcome, None, when, user_properties=properties)  # type: ignore[arg-type]
        )

    one, *others = sorted(ROWS)
    report("passed", "call", one)
    report("failed", "call", others[0])
    report("passed", "setup", others[1])
    assert recorder.rows == {one}
