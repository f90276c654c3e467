"""Rotary scaling in every published spelling: how long a context may be, and the same logits as transformers beyond the original
length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import edit_json
from tests.engine.ranks import tp_engine
from tests.engine.reference import ask, engine, prompt
from tests.llm.quantised import awq, gptq, rewrite
from tests.original_format import make_text
from vlserve.config import SamplingParams
from vlserve.engine.messages import Add
from vlserve.errors import ConfigError, ModelError
from vlserve.models.checkpoint import read_checkpoint
from vlserve.plan.tp_plan import make_plan

LENGTH = 64  # max_position_embeddings where the case says no other
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "type": "yarn"}  # as on Qwen2.5's page
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
LONG = {"long_factor": [1.5, 2.0, 4.0, 9.0], "short_factor": [1.0, 1.1, 1.3, 2.0], "rope_type": "longrope"}
# keys of text_config, and the default and the largest max_model_len
CASES: list[tuple[dict[str, Any], int, int]] = [
    ({"rope_scaling": None, "rope_theta": 1e6}, 64, 64),
    ({"rope_scaling": YARN, "rope_theta": 1e6}, 256, 256),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}}, 192, 192),  # Qwen3's page
    ({"rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 4.0}}, 256, 256),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}}, 256, 256),
    ({"rope_scaling": YARN, "max_position_embeddings": 256}, 256, 256),
    ({"rope_scaling": YARN, "original_max_position_embeddings": 32}, 128, 128),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, 256, 256),
    ({"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, 128, 128),
    (
        {"rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": None, "truncate": False, "attention_factor": None}},
        256,
        256,
    ),
    ({"rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "rope_theta": 1e6}, 64, 128),  # InternVL3-8B-hf
    ({"rope_scaling": {"factor": 4.0, "type": "dynamic"}}, 64, 256),  # InternLM2
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}}, 64, 256),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "max_position_embeddings": 128}, 128, 128),
    ({"rope_scaling": YARN | {"factor": None}, "max_position_embeddings": 256}, 256, 256),
    ({"rope_scaling": LONG, "max_position_embeddings": 256, "original_max_position_embeddings": 64}, 64, 256),
    ({"rope_scaling": LONG | {"factor": 8.0, "original_max_position_embeddings": 32}, "max_position_embeddings": 128}, 32, 128),
    ({"rope_scaling": LONG | {"attention_factor": 1.5}}, 64, 64),
]


@pytest.fixture(scope="module")
def base(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rope") / "base"
    shutil.copytree(checkpoint("qwen2"), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["rope_parameters"]
    config["text_config"]["max_position_embeddings"] = LENGTH
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_text(base: Path, folder: Path, settings: dict[str, Any]) -> Path:
    shutil.copytree(base, folder, dirs_exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("settings,default,longest", CASES, ids=str)
def test_logits_equal_transformers_up_to_the_longest_context(
    settings: dict[str, Any], default: int, longest: int, base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    folder = with_text(base, tmp_path, settings)
    config = read_checkpoint(folder).config
    assert make_plan(config, tp=1).max_model_len == default
    limit = r"(\(\d+ x factor [248]\)|\(max_position_embeddings\)).* within text_config"
    with pytest.raises(ConfigError, match=f"max_model_len {longest + 1} is more than the checkpoint's limit, {longest} {limit}"):
        make_plan(config, tp=1, max_model_len=longest + 1)

    ours = engine(folder, max_model_len=longest, kv_cache_gib=0.02)
    ids = torch.randint(0, 300, (longest,), generator=torch.Generator().manual_seed(1))
    add = Add(id=0, token_ids=ids[:-1].tolist(), media=[], sampling=SamplingParams(logprobs=5), max_tokens=1)
    ours.add(add, [])
    events = [event for _ in range(99) if ours.has_work for event in ours.step()]
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():  # of a text of the longest context: dynamic scaling depends on it
        wanted = reference(input_ids=ids[None]).logits[0, -2].log_softmax(-1)
    assert events[0].logprob is not None
    for id, value in events[0].logprob.top:
        assert value == pytest.approx(float(wanted[id]), abs=1e-4)


@pytest.mark.parametrize("settings,default,longest", [CASES[1], CASES[10], CASES[15]], ids=str)
def test_the_engine_has_the_plans_length(
    settings: dict[str, Any], default: int, longest: int, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_text(base, tmp_path, settings)
    assert engine(folder).runner.max_model_len == default
    assert "frequencies" not in caplog.text
    with pytest.raises(ConfigError, match=f"max_model_len {longest + 1} is more than"):
        engine(folder, max_model_len=longest + 1)
    engine(folder, max_model_len=longest)
    assert (f"rope scaling: frequencies are those of a text of max_model_len {longest}" in caplog.text) == (default < longest)


PHI = {"rope_scaling": {"type": "su", **{key: LONG[key] for key in ("long_factor", "short_factor")}}}  # as InternVL2-4B has it
PHI |= {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
OF_THREE = {"type": "longrope", "long_factor": [1.5, 2.0, 4.0], "short_factor": [1, 1.1, 1.3]}


@pytest.mark.parametrize(
    "settings",
    [PHI, PHI | {"rope_scaling": OF_THREE, "partial_rotary_factor": 0.75}, {"partial_rotary_factor": 0.5, "rope_scaling": None}],
    ids=("Phi-3-128k", "Phi-4-mini", "partial"),
)
@pytest.mark.parametrize("length", (64, 65))
def test_phi3_has_the_frequencies_of_max_model_len(
    settings: dict[str, Any], length: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """In transformers a text of more than 64 tokens has the long ones; here all texts have, where it could be as long."""
    from transformers import AutoModelForCausalLM

    folder = make_text(checkpoint("phi3", tie_word_embeddings=True), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"rope_theta": 1e4} | settings
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config).replace('"su"', '"longrope"'))  # transformers 5.23 fails over su
    ids = torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = reference(input_ids=ids[None]).logits[0, -2].log_softmax(-1)
    (folder / "config.json").write_text(json.dumps(config))
    for tp in (1, 2):
        with tp_engine(folder, tp, max_model_len=length) as (ours, _):
            ours.add(Add(id=0, token_ids=ids[:-1].tolist(), media=[], sampling=SamplingParams(logprobs=5), max_tokens=1), [])
            events = [event for _ in range(99) if ours.has_work for event in ours.step()]
        assert events[0].logprob is not None
        for id, value in events[0].logprob.top:
            assert value == pytest.approx(float(wanted[id]), abs=1e-4)


def test_parts_of_heads_are_quantised_as_their_dequantised_weights(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Packed outputs, eight in a word, are put in order as well."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    dense = make_text(checkpoint("phi3", **shape), tmp_path / "model")
    edit_json(dense / "config.json", partial_rotary_factor=0.5, rope_parameters=None)
    for name, recipe in {"awq": awq(32), "gptq": gptq(32, symmetric=False)}.items():
        folder, meant = rewrite(dense, tmp_path / name, recipe)
        prompts = [prompt(folder, "What shape is it?")]
        wanted = ask(engine(meant), prompts)
        with tp_engine(folder, 2) as (ours, _):
            assert ask(ours, prompts) == wanted, name


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling has factor 4.0 and no rope_type"),
        (
            {"rope_scaling": {"rope_type": "longrope", "long_factor": [1], "short_factor": [1]}},
            "rope_scaling.short_factor has 1 numbers; expected 4, one for each pair of a head's channels that is turned",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "rope_type 'mrope' is not supported"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling has no short_factor, which rope_type 'longrope' needs"),
        ({"rope_scaling": LONG | {"long_factor": None}}, "rope_scaling has no long_factor"),
        ({"rope_scaling": LONG | {"long_factor": "4"}}, "long_factor is '4'; expected 4"),
        ({"rope_scaling": LONG | {"long_factor": [1, 2, 3, -4]}}, "long_factor is -4; expected a number above 0"),
        (
            {"rope_scaling": {"type": "su2"}},
            "'su2' is not supported; supported: default, linear, dynamic, yarn, llama3, longrope",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; supported: 1"),
        ({"rope_theta": "x"}, "text_config.rope_theta is 'x'; expected a number above 0"),
        ({"rope_parameters": {"rope_theta": 0}}, "text_config.rope_theta is 0; expected"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "text_config.rope_scaling.factor is '4'; expected"),
        ({"rope_scaling": YARN | {"beta_fast": []}}, r"text_config.rope_scaling.beta_fast is \[\]; expected"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": -1}}, "original_max_position_embeddings is -1; expected"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "expected one setting for all layers"),
        *(
            ({"rope_scaling": {"rope_type": rope_type}}, f"rope_scaling has no factor, which rope_type '{rope_type}' needs")
            for rope_type in ("linear", "dynamic", "yarn", "llama3")
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None}}, "rope_scaling has no factor"),  # the lengths tell none
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling has no low_freq_factor"),
        ({"rope_scaling": [YARN]}, "text_config.rope_scaling .* is not supported"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_followed_is_named_before_a_rank_starts(
    settings: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        read_checkpoint(with_text(base, tmp_path, settings))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters", "rope_theta", "max_position_embeddings"])
def test_what_stands_beside_text_config_and_belongs_in_it_is_refused(key: str, base: Path, tmp_path: Path) -> None:
    """It would have no effect, and transformers fails over it; equal to text_config's, or null, it is harmless."""
    folder = with_text(base, tmp_path, {"rope_theta": 1e6, "rope_scaling": YARN, "rope_parameters": YARN})
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    for value in (None, config["text_config"][key], 128 if "_m" in key or "theta" in key else scaling):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        if value in (None, config["text_config"][key]):
            read_checkpoint(folder)
    message = f"config.json has {key} at its top level, where it has no effect; move it into text_config"
    with pytest.raises(ModelError, match=message):
        read_checkpoint(folder)
    assert any(message in reason for reason in make_plan(json.loads((folder / "config.json").read_text()), tp=1).unsupported)
