"""What README.md and docs/ tell people to type is typed here, and what they say is printed is printed.

A block that cannot run here says why in a comment on the line above it: `<!-- not run: needs two machines -->`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import (
    CONSOLE,
    PYTHON,
    ROOT,
    SERVED,
    SHELL,
    Block,
    documents,
    make_folder,
    read_blocks,
    run_console,
    run_python,
    run_shell,
)
from tests.plan.test_tp_plan import PUBLISHED
from tests.server.running import RunningServer

DOCUMENTS = {path.relative_to(ROOT).as_posix(): list(read_blocks(path)) for path in documents()}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of the one that documents start by `make serve` and ask on port 8000."""
    running = RunningServer(*SERVED)
    try:
        running.wait_ready()
        yield running.base
    finally:
        running.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The repository as a reader has it, and the config.json of a model that a document plans for."""
    make_folder(tmp_path)
    (tmp_path / "InternVL3-38B-hf").mkdir()
    (tmp_path / "InternVL3-38B-hf/config.json").write_text(json.dumps(PUBLISHED["InternVL3-38B-hf"][0]))
    return tmp_path


def run(block: Block, names: dict[str, object], folder: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    if block.language in CONSOLE:
        run_console(block.text, folder, server)
        return
    if block.language in PYTHON:
        run_python(block.text, names, server, block)
        printed = capsys.readouterr().out
    else:
        printed = run_shell(block.text, folder, server)
    for said in block.printed:
        assert said in printed, f"{block} prints\n{printed}\nand the document says\n{said}"


@pytest.mark.parametrize("document", [name for name, blocks in DOCUMENTS.items() if any(b.reason is None for b in blocks)])
def test_what_a_document_says_to_type(
    document: str, folder: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}  # a document's Python blocks build on one another
    for block in DOCUMENTS[document]:
        if block.reason is None:
            run(block, names, folder, server, capsys)


def test_every_block_is_run_or_says_why_not() -> None:
    blocks = [block for blocks in DOCUMENTS.values() for block in blocks]
    assert {block.language for block in blocks} <= {*SHELL, *CONSOLE, *PYTHON}, "a language that is not known here"
    without = [str(block) for block in blocks if block.reason == ""]
    assert not without, f"blocks whose marker has no reason: {without}"
