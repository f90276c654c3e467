"""`python -m tests.kernels.covered` runs the kernels' tests and writes covered.json: what they launch, by file (facts.py).

It is kept, so that what engines launch can be judged without running these tests; conftest.py holds it to what they do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("covered.json")
RENEW = "VLSERVE_TEST_RENEW_COVERED"  # the path of a file to which each file of tests adds a line


def read() -> dict[str, set[str]]:
    return {name: set(found) for name, found in json.loads(FILE.read_text()).items()}


def renewed(name: str, found: set[str]) -> bool:
    """Whether that is being done; then what was found is kept."""
    if path := os.environ.get(RENEW):
        with open(path, "a") as file:
            file.write(json.dumps([name, sorted(found)]) + "\n")
    return bool(path)


def main() -> int:
    path = FILE.with_suffix(".new")
    path.unlink(missing_ok=True)
    status = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(sys.argv[1:] or ["tests/kernels"])],
        cwd=ROOT,
        env=os.environ | {RENEW: str(path)},
    ).returncode
    if status == 0:
        found = dict(json.loads(line) for line in path.read_text().splitlines())
        kept = json.loads(FILE.read_text()) if sys.argv[1:] and FILE.exists() else {}
        FILE.write_text(json.dumps({n: f for n, f in sorted((kept | found).items()) if f}, indent=1) + "\n")
    path.unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
