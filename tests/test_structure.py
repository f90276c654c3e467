"""Who may import whom, what a rank may load, and that the public names are all there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vlserve

ROOT = Path(__file__).parent.parent
ALLOWED = {"kernels": {"kernels"}, "llm": {"llm", "kernels"}, "vision": {"vision", "kernels"}}
FRONT = ("server", "client", "pipeline", "prompt", "tokenizer", "messages", "answer", "observer", "media", "outputs", "cli")
FRONT += (
    "launch",
    "supervisor",
    "follow",
    "pixels",
    "balance",
    "loader",
    "fetch",
    "sources",
    "asking",
    "remote",
    "flags",
    "commands",
    "doctor",
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """First name after `vlserve.` of everything that a file imports from the project."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("vlserve.")}


@pytest.mark.parametrize("room", ALLOWED)
def test_the_three_rooms_import_only_downwards(room: str) -> None:
    files = list((ROOT / room).glob("*.py"))
    assert files
    for path in files:
        assert ours(path) <= ALLOWED[room], path


def test_the_engine_never_imports_the_front() -> None:
    for path in [*(ROOT / "vlserve/engine").glob("*.py"), ROOT / "vlserve/rank.py"]:
        assert not ours(path) & set(FRONT), path


def test_the_front_takes_only_the_messages_from_the_engine() -> None:
    folders = ("server", "commands", "doctor")
    files = [ROOT / f"vlserve/{name}.py" for name in FRONT if name not in folders]
    for path in [*files, *(path for folder in folders for path in (ROOT / "vlserve" / folder).glob("*.py"))]:
        engine = {name for name in imports(path) if name.startswith("vlserve.engine.")}
        if path.name == "shard.py":  # a tool that builds models itself
            engine -= {name for name in engine if name.startswith("vlserve.engine.loading")}
        assert all(name.startswith("vlserve.engine.messages") for name in engine), path


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_a_rank_loads_no_web_framework_and_no_transformers() -> None:
    loaded = loaded_by("import vlserve.rank, vlserve.engine.engine")
    assert "torch" in loaded and "timm" in loaded
    assert not loaded & {"fastapi", "starlette", "uvicorn", "transformers", "tokenizers", "jinja2", "pydantic", "xgrammar"}


def test_the_front_starts_without_torch() -> None:
    loaded = loaded_by("import vlserve.cli, vlserve.pipeline, vlserve.server.serve")
    assert not loaded & {"torch", "timm", "transformers", "torchvision", "httpx2", "httpcore2", "xgrammar"}


def test_it_runs_where_triton_does_not_exist() -> None:
    code = "import sys; sys.modules['triton'] = None; import vlserve.engine.engine, vlserve.pipeline"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    assert vlserve.__all__ == sorted(vlserve.__all__)
    for name in vlserve.__all__:
        assert getattr(vlserve, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vlserve.nothing


def test_no_pickle_anywhere() -> None:
    for path in ROOT.glob("**/*.py"):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts):  # environments and caches
            continue
        assert not imports(path) & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, path
        assert "torch." + "load(" not in path.read_text(), path
