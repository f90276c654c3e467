"""What was found, in a folder, written after each part: rows.jsonl, log.txt and summary.json; and what passed, for later runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contact.isolated import PASSED

BEFORE, NOT_RUN, RUNNING = "passed before", "not run", "running"


@dataclass(slots=True, kw_only=True)
class Result:
    part: str
    status: str = NOT_RUN
    seconds: float = 0.0
    limit_s: float
    reason: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


class Record:
    """`results` in the order of the parts."""

    def __init__(self, out: Path, results: list[Result], about: dict[str, Any]) -> None:
        self.results, self._about = results, about
        self.rows, self.log, self.summary = out / "rows.jsonl", out / "log.txt", out / "summary.json"
        out.mkdir(parents=True, exist_ok=True)
        for path in (self.rows, self.log):
            path.write_text("")
        self.save()

    def head(self, name: str) -> None:
        with self.log.open("a") as file:
            file.write(f"\n===== {name}\n")

    def rows_of(self, name: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.rows.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "part"} for row in rows if row["part"] == name]

    def save(self) -> None:
        document = self._about | {"passed": self.has_passed, "parts": [asdict(result) for result in self.results]}
        new = self.summary.with_suffix(".new")
        new.write_text(json.dumps(document, indent=1) + "\n")
        new.replace(self.summary)

    @property
    def has_passed(self) -> bool:
        return all(result.status in (PASSED, BEFORE) for result in self.results)

    def table(self) -> str:
        lines = [f"{'part':12}{'status':15}{'seconds':>8}  {'limit':>5}  first line of the error"]
        for one in self.results:
            lines.append(f"{one.part:12}{one.status:15}{one.seconds:8.1f}  {one.limit_s:5.0f}  {one.reason[:200]}".rstrip())
        return "\n".join(lines)

    def figures(self) -> str:
        """Those of the timings, a line each."""
        rows = [row for one in self.results for row in one.rows if "microseconds" in row]
        return "\n".join(
            f"{row['figure']:64}{row['microseconds']:10.1f} us  {_share(row['of_measured_floor'])} of the floor "
            f"by measured rates, {_share(row['of_data_sheet_floor'])} by the data sheet's ({row['limit']})"
            for row in rows
        )


def _share(value: float | None) -> str:
    return "   -" if value is None else f"{value:4.0%}"


class Passed:
    """By part, in files of their own: the key under which it passed, and what it found."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, part: str, key: str) -> Result | None:
        path = self._folder / f"{part}.json"
        if not path.exists():
            return None
        document = json.loads(path.read_text())
        if document.pop("key") != key:
            return None
        return Result(**document | {"status": BEFORE})

    def keep(self, result: Result, key: str) -> None:
        (self._folder / f"{result.part}.json").write_text(json.dumps({"key": key, **asdict(result)}))
