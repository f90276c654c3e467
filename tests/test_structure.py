"""The order of the rooms, that nothing imports in a circle, what a rank and the front may load, and the public names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vlserve

ROOT = Path(__file__).parent.parent
# from the ground up: a room imports what stands before it
ROOMS = (
    *("kernels", "llm", "vision", "ground", "models", "plan", "structured", "prompt", "media"),
    *("engine", "ranks", "pipeline", "doctor", "quantize", "convert", "server", "commands"),
)
OUTSIDE = ("kernels", "llm", "vision")  # at the top level of the repository, linked into the package
OPERATIONS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
OPERATION_FILES = {"__init__", "reference", "types", "cpu", "triton"}
BESIDE = {  # what else an operation has files for
    "attention": {"launch", "plan"},
    "experts": {"launch", "pairs", "triton_pairs"},
    "int4_pairs": {"launch"},
    "rotary": {"table"},
    "sampling": {"noise", "triton_filter"},
}
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


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from outside_functions(child)


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Everything that a file imports, wherever in it, or without `lazy` outside of functions."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if lazy else outside_functions(tree):
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


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operations_files_are_named_as_every_others(operation: str) -> None:
    files = {path.stem for path in (ROOT / "kernels" / operation).glob("*.py")}
    assert {"__init__", "reference", "triton"} <= files
    assert files - OPERATION_FILES == BESIDE.get(operation, set())
    assert f'"vlserve.kernels.{operation}",' in (ROOT / "pyproject.toml").read_text(), "it is installed"


def test_operations_import_one_another_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name in (name for name in inner() if name.startswith("vlserve.kernels.")):
        whole = ".".join(name.split(".")[:3])
        graph.setdefault(whole, set()).update(
            {".".join(found.split(".")[:3]) for found in ours(name)} - {whole, "vlserve.kernels"}
        )
    TopologicalSorter(graph).prepare()


def is_of_triton(name: str) -> bool:
    """Whether a module's name says that it needs Triton."""
    return name.startswith("vlserve.kernels.") and name.split(".")[-1].startswith("triton")


def test_triton_is_imported_where_it_is_launched() -> None:
    """Within functions alone, but for files that are named after it."""
    for name in (name for name in inner() if not is_of_triton(name)):
        at_once = imports(modules()[name], lazy=False)
        found = {other for other in at_once if other.split(".")[0] == "triton" or (other in modules() and is_of_triton(other))}
        assert not found, f"{name} imports {sorted(found)} when it is imported"


def test_the_core_knows_no_family_of_models() -> None:
    families = ("internvl", "qwen", "llava", "gemma")
    for room in ("engine", "ranks", "server"):
        for path in (ROOT / "vlserve" / room).glob("**/*.py"):
            found = [word for word in families if word in path.read_text().lower()]
            assert not found, f"{path} names {found}"


def test_tests_mirror_the_tree() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert folders <= {*ROOMS, "examples", "benchmarks", "rehearsal"}
    assert sorted(path.parent.name for path in (ROOT / "tests/kernels").glob("*/__init__.py")) == OPERATIONS


def test_the_documents_name_the_rooms_in_their_order_and_files_that_exist() -> None:
    rooms = re.findall(r"^\| `?(\w+)/?`? \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    assert rooms[: len(ROOMS) + 1] == ["room", *reversed(ROOMS)]
    bases = ROOT, ROOT / "vlserve", ROOT / "examples/plugin_model"
    for name in ("architecture", "adding_a_model"):
        paths = re.findall(r"(?:\w+/)+\w+\.(?:py|md|json)\b", (ROOT / f"docs/{name}.md").read_text())
        missing = {path for path in paths if not any((base / path).exists() for base in bases)}
        assert paths and not missing, f"docs/{name}.md names {sorted(missing)}"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_a_rank_loads_no_web_framework_and_no_transformers() -> None:
    loaded = loaded_by("import vlserve.rank, vlserve.engine.engine")
    assert "torch" in loaded and "timm" not in loaded  # which takes seconds and is the families' that need it
    loaded = loaded_by("import vlserve.rank, vlserve.engine.engine, vlserve.vision.internvit_tower")
    assert "timm" in loaded
    assert not loaded & {"fastapi", "starlette", "uvicorn", "transformers", "tokenizers", "jinja2", "pydantic", "xgrammar"}


def test_the_front_starts_without_torch() -> None:
    loaded = loaded_by("import vlserve.commands.main, vlserve.pipeline.local, vlserve.server.serve")
    assert not loaded & {"torch", "timm", "transformers", "torchvision", "httpx2", "httpcore2", "xgrammar"}


def test_it_runs_where_triton_does_not_exist() -> None:
    kernels = [name for name in inner() if name.startswith("vlserve.kernels") and not is_of_triton(name)]
    names = ["vlserve.engine.engine", "vlserve.pipeline.local", *kernels]
    code = f"import sys; sys.modules['triton'] = None; import {', '.join(names)}"
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
