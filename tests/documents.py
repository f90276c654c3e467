"""The blocks of a Markdown document, and a folder in which they run as a reader would run them."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tests.server.running import RunningServer

ROOT = Path(__file__).parents[1]
SHELL, CONSOLE, PYTHON = ("", "bash", "sh"), ("console",), ("python",)
OTHERS = ("text", "json", "toml", "yaml")  # nothing to run
LINKED = ("examples", "docs", "constraints.txt", "Makefile", "pyproject.toml")  # what blocks name, from the repository's root
SERVERS = re.compile(r"http://(?:127\.0\.0\.1|host):8000\b")
MARK = re.compile(r"<!-- not run: (.+) -->")
SERVED = ("demo", "--max-model-len", "4096", "--kv-cache-gib", "0.1")  # by the server that is there for all documents
PRINTS = re.compile(r"(?:\bprints|`content` is)\s+`([^`]+)`")
COMMENT = re.compile(r"^.*\bprint\(.*\)  # (.+)$", re.MULTILINE)
ANY_LINES = "..."  # of a console's output
WAIT_S = 120


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: where it stands, and what the document says of it."""

    document: str
    line: int
    language: str
    text: str
    reason: str | None  # why it is not run; "" for a marker without one
    after: str  # the paragraph behind it

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def printed(self) -> list[str]:
        """What it prints, as the document says in comments behind `print` or in the next paragraph."""
        return COMMENT.findall(self.text) if self.language in PYTHON else PRINTS.findall(self.after)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_blocks(path: Path) -> Iterator[Block]:
    """All blocks but those of other languages; marked ones too."""
    lines = path.read_text(encoding="utf-8").splitlines()
    name = path.relative_to(ROOT).as_posix()
    start = 0
    while start < len(lines):
        fence = re.fullmatch(r"( *)```(.*)", lines[start])
        if fence is None:
            start += 1
            continue
        end = next(i for i in range(start + 1, len(lines)) if lines[i].strip() == "```")
        if fence[2] not in OTHERS:
            text = "".join(line.removeprefix(fence[1]) + "\n" for line in lines[start + 1 : end])
            yield Block(name, start + 1, fence[2], text, _reason(lines[:start]), _paragraph(lines[end + 1 :]))
        start = end + 1


def _reason(before: list[str]) -> str | None:
    last = before[-1].strip() if before else ""
    if not last.startswith("<!-- not run"):
        return None
    mark = MARK.fullmatch(last)
    return mark[1].strip() if mark else ""


def _paragraph(lines: list[str]) -> str:
    """The first of some lines, which may begin with an empty one."""
    return " ".join(takewhile(bool, lines[lines[:1] == [""] :]))


def make_folder(folder: Path) -> None:
    """The repository's root as far as blocks see it, with `.venv/bin`; what they write stays in `folder`."""
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    scripts = folder / ".venv/bin"
    scripts.mkdir(parents=True)
    _write_script(scripts / "python", f'exec "{sys.executable}" "$@"')
    _write_script(scripts / "vlserve", f'exec "{sys.executable}" -m tests.documents "$@"')
    _write_script(scripts / "make", f'exec "{sys.executable}" -m tests.documents make "$@"')


def _write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run_shell(text: str, folder: Path, server: str) -> str:
    """What `bash -e` prints; fails with all of it when a command does."""
    environment = os.environ | {
        "PATH": f"{folder / '.venv/bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DOCUMENTS_SERVER": server,
    }
    command = ["bash", "-e", "-o", "pipefail", "-c", SERVERS.sub(server, text)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, f"status {done.returncode} of\n{text}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_console(text: str, folder: Path, server: str) -> None:
    """Lines behind `$ ` are commands, the others their output, where a line of three dots stands for any lines."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, wanted = part.partition("\n")
        got = run_shell(f"({command}) 2>&1 || true\n", folder, server).strip()
        pattern = "\n".join("(?s:.*)" if line == ANY_LINES else re.escape(line) for line in wanted.strip().split("\n"))
        assert re.fullmatch(pattern, got), f"{command} prints\n{got}\nand the document says\n{wanted}"


def run_python(text: str, names: dict[str, object], server: str, where: Block) -> None:
    """In the namespace `names`; line numbers are the document's."""
    code = "\n" * where.line + SERVERS.sub(server, text)
    exec(compile(code, ROOT / where.document, "exec"), names)


def _main(arguments: list[str]) -> int:
    """`vlserve`, but that a server ends when it is ready, and the one that runs already is not started again."""
    if arguments[:1] == ["make"]:
        return _make(arguments[1:])
    if arguments[:1] != ["serve"]:
        from vlserve.commands.main import main

        return main(arguments)
    if tuple(arguments[1:]) == SERVED:
        return _ask_health()
    server = RunningServer(*arguments[1:])
    try:
        server.wait_ready()
        server.process.terminate()
        return 0 if server.wait() in (0, -signal.SIGTERM) else 1
    finally:
        server.kill()


def _make(targets: list[str]) -> int:
    """`make serve` is the server that runs already; what make would start is looked at."""
    assert targets == ["serve"], f"make {targets}: only `make serve` is known here"
    others = os.environ["PATH"].partition(os.pathsep)[2]
    plan = subprocess.run(
        ["make", "-n", "serve"], cwd=ROOT, env=os.environ | {"PATH": others}, capture_output=True, text=True, check=True
    )
    assert ".venv/bin/vlserve serve demo" in plan.stdout, plan.stdout
    return _ask_health()


def _ask_health() -> int:
    return subprocess.run(["curl", "-sf", os.environ["DOCUMENTS_SERVER"] + "/health"]).returncode


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
