"""Models from other packages: the example is installed, found, and answers as transformers does; faulty ones are named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.engine.reference import Transformers, ask, engine, prompt
from tests.vision.test_preprocess import noise
from vlserve import ModelError, VLPipeline
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.registry import BUILT_IN, find_architecture

EXAMPLE = Path(__file__).parents[2] / "examples/plugin_model"
sys.path.append(str(EXAMPLE))
from try_it import make_checkpoint  # noqa: E402

Distribute = Callable[..., None]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Puts a folder on the import path of this process and of those that it starts."""

    def add(folder: Path) -> None:
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))

    return add


@pytest.fixture
def distribute(tmp_path: Path, path: Callable[[Path], None]) -> Distribute:
    """Writes installed distributions of one module and one entry point."""

    def write(name: str, value: str, *, model_type: str = "llava", code: str = "") -> None:
        folder = tmp_path / "site" / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[vlserve.models]\n{model_type} = {value}\n")
        (folder / f"{name}.py").write_text(code)
        path(folder)

    return write


def test_the_example_answers_as_transformers_does(installed: Path, llava: Path, path: Callable[[Path], None]) -> None:
    path(installed)
    reference = Transformers(llava)
    with VLPipeline(str(llava), dtype="float32", kv_cache_gib=0.05) as pipe:
        for size, questions in (((60, 30), ("What shape is it?",)), ((28, 28), ("a",)), ((1, 90), ("How many?", "And now?"))):
            picture = Image.fromarray(noise(*size))
            for question in questions:
                prompt_ids, want, _ = reference.generate(question, [picture], 12)
                got = pipe((question, picture), max_tokens=12)
                assert got.usage.prompt_tokens == len(prompt_ids) and got.usage.image_tokens == 16
                assert list(got.token_ids) == want
        two = [Image.fromarray(noise(40, 20 + i)) for i in range(2)]
        assert list(pipe(("Compare.", two), max_tokens=8).token_ids) == reference.generate("Compare.", two, 8)[1]
        assert pipe("no picture", max_tokens=3).usage.image_tokens == 0


def test_the_front_reads_the_example_without_torch(installed: Path, llava: Path, path: Callable[[Path], None]) -> None:
    path(installed)
    code = "import sys; from vlserve.models.checkpoint import *; read_checkpoint(Path(sys.argv[1]))"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(llava)], check=True)


def test_a_config_that_the_example_cannot_serve_is_refused(
    installed: Path, llava: Path, path: Callable[[Path], None], tmp_path: Path
) -> None:
    path(installed)
    folder = shutil.copytree(llava, tmp_path / "copy")
    config = json.loads((llava / "config.json").read_text())
    vision = config.pop("vision_config")
    for changed, message in (
        (config | {"vision_feature_layer": -2}, "vision_feature_layer -2 is not supported"),
        ({key: value for key, value in config.items() if key != "vision_feature_layer"}, "vision_feature_layer None"),
        (config | {"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        (config | {"vision_config": vision | {"hidden_act": "gelu"}}, "hidden_act 'gelu'"),
        (config | {"vision_config": vision | {"model_type": "clip_vision_model"}}, "model_type 'clip_vision_model'"),
    ):
        (folder / "config.json").write_text(json.dumps({"vision_config": vision} | changed))
        with pytest.raises(ModelError, match=message):
            read_checkpoint(folder)


def test_the_example_reads_names_of_transformers_4(
    installed: Path, llava: Path, path: Callable[[Path], None], tmp_path: Path
) -> None:
    path(installed)
    folder = shutil.copytree(llava, tmp_path / "copy")
    weights = load_file(llava / "model.safetensors")
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in weights.items()}
    assert old.keys() != weights.keys()
    save_file(old | {"vision_tower.vision_model.head.probe": torch.zeros(1, 1, 32)}, folder / "model.safetensors")
    picture = Image.fromarray(noise(28, 28))
    asked = prompt(llava, "What?", [picture])
    assert ask(engine(folder), [asked]) == ask(engine(llava), [asked])


def test_without_the_package_the_error_says_what_there_is(llava: Path, distribute: Distribute) -> None:
    distribute("other", "other:ARCHITECTURE", model_type="something")
    with pytest.raises(ModelError, match=r"'llava' .*supported: .*internvl, .*something.*vlserve\.models"):
        VLPipeline(str(llava))


OLDER = "import vlserve; ARCHITECTURE = vlserve.Architecture(read_image_config=None, build=None, image_tokens=None)"
FAULTY = [
    ("raises", "raises:ARCHITECTURE", "1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
    ("nothing", "nothing_here:ARCHITECTURE", "", "cannot be imported: ModuleNotFoundError: No module named 'nothing_here'"),
    ("lacks", "lacks:ARCHITECTURE", "", "cannot be imported: AttributeError"),
    ("older", "older:ARCHITECTURE", OLDER, "cannot be imported: TypeError: Architecture.__init__() got an unexpected keyword"),
    ("wrong", "wrong:ARCHITECTURE", "ARCHITECTURE = dict", "is 'type'; expected an instance of vlserve.Architecture"),
]


@pytest.mark.parametrize("name,value,code,message", FAULTY, ids=[case[0] for case in FAULTY])
def test_a_faulty_package_is_named(name: str, value: str, code: str, message: str, llava: Path, distribute: Distribute) -> None:
    distribute(name, value, code=code)
    with pytest.raises(ModelError) as error:
        VLPipeline(str(llava))
    assert str(error.value).startswith(f"{name} 1.0 (entry point llava = {value}) {message}")
    assert ("docs/adding_a_model.md" in str(error.value)) == (name == "older")


def test_two_packages_for_one_model_are_both_named(
    installed: Path, llava: Path, distribute: Distribute, path: Distribute
) -> None:
    path(installed)
    distribute("other", "other:ARCHITECTURE")
    with pytest.raises(
        ModelError, match=r"given by other 1\.0 \(.*\) and by vlserve-llava 0\.1\.0 \(.*\); uninstall all but one"
    ):
        VLPipeline(str(llava))


def test_a_build_that_gives_no_model_is_named_by_the_rank(llava: Path, distribute: Distribute) -> None:
    code = """
import dataclasses, vlserve_llava
ARCHITECTURE = dataclasses.replace(vlserve_llava.LLAVA, build=lambda config, preprocessor, split: object())
"""
    distribute("odd", "odd:ARCHITECTURE", code=code)  # vlserve_llava is imported from the example's folder
    with pytest.raises(ModelError, match=r"odd 1\.0 \(entry point llava = odd:ARCHITECTURE\): build gave 'object'"):
        engine(llava)


def test_what_is_built_in_is_never_looked_up(distribute: Distribute, checkpoint: Callable[..., Path]) -> None:
    distribute("usurper", "usurper:ARCHITECTURE", model_type="internvl", code="raise SystemExit")
    assert find_architecture({"model_type": "internvl"}) is BUILT_IN["internvl"]
    assert read_checkpoint(checkpoint("qwen2")).architecture.origin == "vlserve"
