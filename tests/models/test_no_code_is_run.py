"""Code that comes with a checkpoint is never run: whatever its files say of it, the model is served, or refused by its config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import edit_json
from tests.engine.reference import ask, engine, prompt
from tests.original_format import OUTER, make_original, make_text
from tests.prompt.test_build import copy_of
from vlserve import ModelError
from vlserve.commands.main import main
from vlserve.models.checkpoint import read_checkpoint

Make = Callable[..., Path]
POISON = "import os\n\nos._exit(77)  # whoever runs this is gone\n"
MODULES = (
    "configuration_x",
    "modeling_x",
    "tokenization_x",
    "processing_x",
    "conversation",
    "custom_generate/generate",
    "__init__",
)
OURS = ("torch", "numpy", "json", "tokenizers", "safetensors", "jinja2", "PIL", "triton", "timm", "vlserve", "sitecustomize")
CONFIG = {"AutoConfig": "configuration_x.C", "AutoModel": "modeling_x.M", "AutoModelForCausalLM": "modeling_x.M"}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_x.T", "tokenization_x.F"], "AutoProcessor": "processing_x.P"}}


def poison(folder: Path) -> Path:
    """All that makes other programs run a checkpoint's code, where they trust it."""
    for name in (*MODULES, *OURS):
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(POISON)
    config = json.loads((folder / "config.json").read_text())
    inner = {key: config[key] | {"auto_map": CONFIG} for key in ("text_config", "llm_config", "vision_config") if key in config}
    edit_json(folder / "config.json", auto_map=CONFIG, trust_remote_code=True, custom_pipelines={"x": {"impl": "p.P"}}, **inner)
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "generation_config.json"):
        if (folder / name).exists():
            edit_json(folder / name, trust_remote_code=True, **TOKENIZER)
    return folder


@pytest.mark.parametrize("form", ("internvl", "internvl_chat", "text"))
def test_a_checkpoint_with_code_is_served_without_it(form: str, checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("qwen2", num_hidden_layers=2)
    makers = {
        "internvl": copy_of,
        "internvl_chat": lambda s, t: make_original(s, t / "m"),
        "text": lambda s, t: make_text(s, t / "m"),
    }
    folder = makers[form](source, tmp_path)
    wanted = ask(engine(folder), [prompt(folder, "What shape is it?")])
    poison(folder)
    assert ask(engine(folder), [prompt(folder, "What shape is it?")]) == wanted
    assert main(["plan", str(folder), "--tp", "1"]) == 0


@pytest.mark.parametrize(
    "config,message",
    [
        ({"model_type": "deepseek_vl_x", "architectures": ["X"]}, r"model_type 'deepseek_vl_x' \(architectures \['X'\]\) is not"),
        ({"model_type": "qwen", "architectures": ["QWenLMHeadModel"]}, "model_type 'qwen'"),  # the first Qwen's
        (
            OUTER | {"llm_config": {"architectures": ["XForCausalLM"]}},
            r"llm_config.architectures \['XForCausalLM'\] is not supported",
        ),
    ],
    ids=lambda given: given.get("model_type") if isinstance(given, dict) else None,
)
def test_a_model_that_only_its_own_code_can_read_is_refused(
    config: dict[str, object], message: str, checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(checkpoint("qwen2", num_hidden_layers=2), tmp_path)
    (folder / "config.json").write_text(json.dumps(config))
    poison(folder)
    with pytest.raises(ModelError, match=message):
        read_checkpoint(folder)
    assert main(["plan", str(folder)]) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no safe path")
def test_a_start_in_the_folder_itself_runs_nothing(checkpoint: Make, tmp_path: Path) -> None:
    """Python looks for modules in the folder that it is started in, and ranks are started as modules."""
    folder = poison(make_original(checkpoint("qwen2", num_hidden_layers=2), tmp_path / "model"))
    command = [sys.executable, "-P", "-m", "vlserve", "run", ".", "--prompt", "What?", "--device", "cpu", "--max-tokens", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([*command, "--kv-cache-gib", "0.01"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
