"""What was seen to work: every engine that answered in a test that passed, as rows of docs/models.md.

`python -m tests.compatibility > docs/models.md` runs the tests of SHOWING and writes the page; so does `pytest --models-page
PATH` with what it runs. A whole run of the suite fails where it showed other rows than the page has, and any run where it showed
more. The rows of a test travel with its report, so that several workers of pytest may run the tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.models.test_qwen_vl_config import PUBLISHED as QWEN_VL
from tests.published import PUBLISHED
from vlserve.config import EngineConfig
from vlserve.engine.engine import Engine
from vlserve.llm.config_readers import READERS
from vlserve.llm.quantisation import Quantisation, find_quantisation
from vlserve.models.checkpoint import find_checkpoint
from vlserve.models.registry import BUILT_IN, find_architecture
from vlserve.plan.tp_plan import make_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/models.md"
SHOWING = ("tests/engine", "tests/llm", "tests/models")
FORMATS = {
    "internvl": "transformers' (-hf)",
    "internvl_chat": "OpenGVLab's own",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
ALONE = "text model"
DECODERS = frozenset(READERS)  # before tests add some
PROPERTY = "answered"  # of a test's report
HEAD = f"""\
# Models that were seen to work

This page is written by the tests that passed: `python -m tests.compatibility > docs/models.md`. A row says that a small random
checkpoint of this format, decoder and kind of weights was loaded and answered, on so many ranks, in a test that judges the
answers. `--language-model-only` serves each model with pictures as a text model too.

{{rows}}

* **Format**: `{FORMATS["internvl"]}` is `model_type: internvl`, `{FORMATS["internvl_chat"]}` is `internvl_chat`, whose code is
  never run; a {ALONE} has its decoder's own `model_type`.
* **Weights**: `dense`, or what the checkpoint's `quantization_config` says and how wide the codes are.
* **Ranks**: degrees of `--tp` that were tried; `--expert-parallel` where it stands beside one. Which degrees a model allows
  follows from its heads, and `vlserve plan MODEL` tells it.

## Published models

By their config.json, which a test writes anew and plans: degrees that need no copies of key-value heads, weights on one rank, and
what a token takes of the KV cache there.

{{models}}
"""


class Row(NamedTuple):
    """What one engine was."""

    form: str
    decoder: str
    weights: str
    ranks: str


_rows: weakref.WeakKeyDictionary[Engine, Row] = weakref.WeakKeyDictionary()
_answered: set[Row] = set()  # in the test that runs


def made(engine: Engine, config: EngineConfig) -> None:
    """To be called for an engine that a test makes."""
    checkpoint = find_checkpoint(config)
    model_type, decoder = checkpoint.config["model_type"], engine.runner.model.decoder.config.model_type
    if model_type in BUILT_IN and decoder in DECODERS:
        ranks = f"{config.tp}{' --expert-parallel' * getattr(config, 'expert_parallel', False)}"
        _rows[engine] = Row(FORMATS.get(model_type, ALONE), decoder, _weights(checkpoint.quantisation), ranks)


def answered(engine: Engine) -> None:
    """To be called for an engine that has answered."""
    if engine in _rows:
        _answered.add(_rows[engine])


def _weights(quantisation: Quantisation | None) -> str:
    return "dense" if quantisation is None else quantisation.name


class Recorder:
    """A plugin of pytest. Rows of tests that passed count."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.rows = config, set[Row]()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        _answered.clear()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        if call.when == "call" and item.nodeid.startswith(SHOWING):
            item.user_properties.append((PROPERTY, [list(row) for row in sorted(_answered)]))
        yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.rows |= {Row(*row) for name, rows in report.user_properties if name == PROPERTY for row in rows}  # type: ignore[attr-defined]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput"):
            return  # the process that started it judges
        if path := self.config.getoption("--models-page"):
            Path(path).write_text(page(self.rows))
        elif session.exitstatus == 0 and (said := difference(self.rows, is_whole=_is_whole(self.config))):
            self.config.get_terminal_writer().line(f"\n{said}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def difference(rows: set[Row], *, is_whole: bool) -> str:
    """What to say where the page has other rows than the tests showed; "" where it has not."""
    listed = read_rows(PAGE.read_text())
    more, fewer = sorted(rows - listed), sorted(listed - rows) if is_whole else []
    parts = [f"{row} is not on it" for row in more[:5]] + [f"{row} is on it, and no test showed it" for row in fewer[:5]]
    return f"docs/models.md: {'; '.join(parts)}. Write it again: python -m tests.compatibility > docs/models.md" if parts else ""


def _is_whole(config: pytest.Config) -> bool:
    """Whether all tests are run."""
    chosen = any(config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "lf", "ignore", "ignore_glob"))
    return not chosen and {Path(argument).resolve() for argument in config.args} <= {ROOT, ROOT / "tests"}


def page(rows: Iterable[Row]) -> str:
    """docs/models.md for these rows."""
    return HEAD.format(rows=_rows_table(set(rows)), models=_models_table())


def _rows_table(rows: set[Row]) -> str:
    ranks = defaultdict[tuple[str, str, str], list[str]](list)
    for row in sorted(rows, key=lambda row: (row[:3], len(row.ranks), row.ranks)):
        ranks[row[:3]].append(row.ranks)
    lines, models = ["| format | decoder | weights | ranks | published |", "|---|---|---|---|---|"], _models()
    for (form, decoder, weights), degrees in sorted(ranks.items()):
        names = ", ".join(_short(name) for name, (config, of) in models.items() if _row(config, of) == (form, decoder, weights))
        lines.append(f"| {form} | `{decoder}` | {weights} | {', '.join(degrees)} | {names} |")
    return "\n".join(lines)


def read_rows(text: str) -> set[Row]:
    """The rows of a page."""
    found = re.findall(r"^\| ([^|`]+) \| `(\w+)` \| ([^|]+) \| ([^|]+) \|[^|]*\|$", text, re.MULTILINE)
    return {Row(form, decoder, weights, one) for form, decoder, weights, ranks in found for one in ranks.split(", ")}


def _models() -> dict[str, tuple[dict[str, Any], str]]:
    """config.json and decoder of each published model."""
    found = {model.name: (model.config, model.decoder) for model in PUBLISHED.values()}
    seeing = {name: (config, find_architecture(config).decoder(config).model_type) for name, config in QWEN_VL.items()}
    return found | {f"Qwen/{name}": of for name, of in seeing.items()}


def _row(config: Mapping[str, Any], decoder: str) -> tuple[str, str, str]:
    return FORMATS.get(config["model_type"], ALONE), decoder, _weights(find_quantisation(config))


def _models_table() -> str:
    lines = ["| model | decoder | weights | `--tp` | GiB | KV per token |", "|---|---|---|---|---|---|"]
    for name, (config, decoder) in _models().items():
        plan = make_plan(config, tp=1)
        (rank,) = plan.ranks
        size = (rank.vision_bytes + rank.decoder_bytes + rank.embedding_bytes) / 2**30
        degrees, kv = ", ".join(map(str, plan.legal_tp)), f"{rank.kv_bytes_per_token / 1024:,.0f} KiB"
        lines.append(f"| {name} | {decoder} | {_row(config, decoder)[2]} | {degrees} | {size:,.1f} | {kv} |")
    return "\n".join(lines)


def _short(name: str) -> str:
    return name.rpartition("/")[2]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page"
        command = [sys.executable, "-m", "pytest", "-q", *SHOWING, "--models-page", str(path)]
        status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        if status == 0:
            print(path.read_text(), end="")
    sys.exit(status)
