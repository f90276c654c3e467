"""The order of the rooms, that nothing imports in a circle, what a rank and the front may load, and the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vlserve

ROOT = Path(__file__).parent.parent
# from the ground up: a room imports what stands before it
ROOMS = (
    *("kernels", "llm", "vision", "ground", "models", "plan", "structured", "prompt", "media"),
    *("engine", "ranks", "pipeline", "doctor", "quantize", "server", "commands"),
)
OUTSIDE = ("kernels", "llm", "vision")  # at the top level of the repository, linked into the package
ENTRIES = ("vlserve", "vlserve.__main__", "vlserve.rank")  # name everything, and are imported by nobody
MOVED = ("vlserve.engine.model",)  # an old name that leads to the new one


@cache
def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    files = [path for path in (ROOT / "vlserve").glob("**/*.py") if path.relative_to(ROOT).parts[1] not in OUTSIDE]
    files += [path for room in OUTSIDE for path in (ROOT / room).glob("**/*.py")]
    found = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "vlserve" else ("vlserve", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Everything that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name: str) -> set[str]:
    """The project's modules that one imports; a name taken from a package counts as the package's."""
    return {found for found in imports(modules()[name]) if found in modules()} - {name, "vlserve"}


def room_of(name: str) -> str:
    first = name.split(".")[1]
    return first if first in ROOMS else "ground"


def inner() -> list[str]:
    return [name for name in modules() if name not in ENTRIES and name not in MOVED]


def test_every_folder_is_a_room_and_every_room_a_folder() -> None:
    folders = {path.parent.name for path in (ROOT / "vlserve").glob("*/__init__.py")}
    assert folders == set(ROOMS) - {"ground"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downwards(room: str) -> None:
    height = ROOMS.index(room)
    for name in (name for name in inner() if room_of(name) == room):
        above = {found for found in ours(name) if found in ENTRIES or ROOMS.index(room_of(found)) > height}
        assert not above, f"{name} imports {sorted(above)}, which stand above it"


def test_kernels_import_nothing_of_ours_and_llm_and_vision_not_each_other() -> None:
    for name in inner():
        rooms = {room_of(found) for found in ours(name)}
        if room_of(name) == "kernels":
            assert rooms <= {"kernels"}, name
        elif room_of(name) in ("llm", "vision"):
            assert rooms <= {room_of(name), "kernels"}, name


def test_nothing_imports_in_a_circle() -> None:
    """Imports within functions and for types count as well."""
    TopologicalSorter({name: ours(name) for name in inner()}).prepare()


def test_the_core_knows_no_family_of_models() -> None:
    families = ("internvl", "qwen", "llava", "gemma")
    for room in ("engine", "ranks", "server"):
        for path in (ROOT / "vlserve" / room).glob("**/*.py"):
            found = [word for word in families if word in path.read_text().lower()]
            assert not found, f"{path} names {found}"


def test_tests_mirror_the_tree() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert folders <= {*ROOMS, "examples", "benchmarks"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_a_rank_loads_no_web_framework_and_no_transformers() -> None:
    loaded = loaded_by("import vlserve.rank, vlserve.engine.engine")
    assert "torch" in loaded and "timm" not in loaded  # which takes seconds and is the families' that need it
    loaded = loaded_by("import vlserve.rank, vlserve.engine.engine, vlserve.vision.internvit")
    assert "timm" in loaded
    assert not loaded & {"fastapi", "starlette", "uvicorn", "transformers", "tokenizers", "jinja2", "pydantic", "xgrammar"}


def test_the_front_starts_without_torch() -> None:
    loaded = loaded_by("import vlserve.commands.main, vlserve.pipeline.local, vlserve.server.serve")
    assert not loaded & {"torch", "timm", "transformers", "torchvision", "httpx2", "httpcore2", "xgrammar"}


def test_it_runs_where_triton_does_not_exist() -> None:
    code = "import sys; sys.modules['triton'] = None; import vlserve.engine.engine, vlserve.pipeline.local"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    assert vlserve.__all__ == sorted(vlserve.__all__)
    for name in vlserve.__all__:
        assert getattr(vlserve, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vlserve.nothing


def test_old_names_lead_to_the_new_ones() -> None:
    import vlserve.engine.model as old
    from vlserve.models.base import Model, build_decoder

    with pytest.warns(DeprecationWarning, match=r"import it from vlserve\.models\.base"):
        assert (old.Model, old.build_decoder) == (Model, build_decoder)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = old.nothing


def test_no_pickle_anywhere() -> None:
    for path in ROOT.glob("**/*.py"):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts):  # environments and caches
            continue
        assert not imports(path) & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, path
        assert "torch." + "load(" not in path.read_text(), path
