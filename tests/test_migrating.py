"""Other servers' names: the document, the table that errors are made from, and our own options agree."""

from __future__ import annotations

import re
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest

from tests.commands.test_main import vlserve
from vlserve import ConfigError, RequestError, SamplingParams, VLPipeline
from vlserve.commands.main import COMMANDS, _flags
from vlserve.config import read_options
from vlserve.migrating import FLAGS, LMDEPLOY, SAMPLING, SGLANG, VLLM, explain_sampling
from vlserve.pipeline.calls import _sampling
from vlserve.server.chat import ChatRequest
from vlserve.server.protocol import read_body

TEXT = (Path(__file__).parent.parent / "docs/migrating.md").read_text()
OURS = {flag for command in COMMANDS for flag in _flags(command)} | {"--no-prefix-caching"}
FLAG = r"--[a-z][a-z-]*"


def rows(section: str) -> list[list[str]]:
    """The cells of all rows below a heading."""
    text = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("project", [LMDEPLOY, VLLM, SGLANG])
def test_the_document_and_the_errors_agree_on_flags(project: str) -> None:
    listed = {flag: here for there, here, _ in rows(project) for flag in re.findall(f"`({FLAG})`", there)}
    assert {flag for flag, foreign in FLAGS.items() if project in foreign.whose} == listed.keys() - OURS
    for flag, here in listed.items():
        wanted = flag if flag in OURS else FLAGS[flag].ours
        assert f"`{wanted}`" in here if wanted else here == "—", flag


def test_the_document_and_the_errors_agree_on_sampling() -> None:
    listed = {there.strip("`"): (whose.split(", "), here.strip("`—")) for there, whose, here, _ in rows("Sampling")}
    assert listed == {name: (list(foreign.whose), foreign.ours) for name, foreign in SAMPLING.items()}
    assert {here for _, here in listed.values() if here} <= SamplingParams.__dataclass_fields__.keys()
    assert not listed.keys() & SamplingParams.__dataclass_fields__.keys()


def test_every_flag_said_to_be_ours_is_one() -> None:
    assert not FLAGS.keys() & OURS
    for foreign in FLAGS.values():
        assert set(re.findall(FLAG, f"{foreign.ours} {foreign.note}")) <= OURS, foreign
    for section in (LMDEPLOY, VLLM, SGLANG):
        for _, here, note in rows(section):
            assert set(re.findall(FLAG, f"{here} {note}")) <= OURS, here


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("serve --server-port 8 somewhere", "--server-port is LMDeploy's; here it is --port"),
        (
            "serve demo --tensor-parallel-size=2",
            "--tensor-parallel-size is vLLM's; here it is --tp",
        ),
        (
            "run --prompt x --quantization awq",
            "--quantization is vLLM's and SGLang's; how a checkpoint is quantised is found in its config.json",
        ),
        ("serve --api-key secret-1234", "--api-key is vLLM's and SGLang's; here it is --api-key-file"),
        ("serve --prot 1", "unrecognized arguments: --prot (did you mean --port?)"),
        ("chat --port 1", "unrecognized arguments: --port (--port belongs to vlserve serve)"),
        ("serve --xyzzy", "unrecognized arguments: --xyzzy\n"),
        ("serve demo another", "unrecognized arguments: another\n"),
    ],
)
def test_the_command_line_names_ours(arguments: str, message: str) -> None:
    done = vlserve(*arguments.split())
    assert done.returncode == 2 and f"vlserve: error: {message}" in done.stderr and "secret" not in done.stderr
    assert done.stderr.startswith(f"vlserve {arguments.split()[0]} --help lists")


@pytest.mark.parametrize(
    "name,message",
    [
        ("tensor_parallel_size", r"\(vLLM's; here it is tp\); options: "),
        ("session_len", r"\(LMDeploy's; here it is max_model_len\); options: "),
        ("disable_radix_cache", r"\(SGLang's; here it is prefix_caching=False\); options: "),
        ("server_port", r"\(LMDeploy's; here it is port of vlserve serve\); options: "),
        ("quant_policy", r"\(LMDeploy's; here it is kv_cache_dtype: 8 is int8; there are no 4 bits\); options: "),
        ("backend_config", r"\(LMDeploy's; its fields are keywords of VLPipeline\); options: "),
        ("model_path", r"\(LMDeploy's and SGLang's; here it is model\); options: "),
        ("port", r"\(an option of vlserve serve\); options: "),
        ("max_num_seq", r"\(did you mean max_num_seqs\?\); options: "),
        ("xyzzy", "; options: "),
    ],
)
def test_the_pipeline_names_ours(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option '{name}' ?{message}"):
        VLPipeline(**{name: 1})
    with pytest.raises(ConfigError):
        read_options({name: 1})


def test_sampling_names_ours_in_python_and_over_http() -> None:
    fields = SamplingParams.__dataclass_fields__
    assert explain_sampling("max_new_tokens", fields) == " (LMDeploy's and SGLang's; here it is max_tokens)"
    assert explain_sampling("temperatur", fields) == " (did you mean temperature?)"
    assert explain_sampling("xyzzy", fields) == ""
    for name, message in (
        ("gen_config", "LMDeploy's; its fields stand beside the prompt"),
        ("max_new_tokens", "here it is max_tokens"),
    ):
        for call in (SamplingParams, lambda **given: _sampling(None, given)):
            with pytest.raises(RequestError, match=f"unknown sampling parameter '{name}' .*{message}"):
                call(**{name: 3})
    assert copy(SamplingParams(seed=3)) == replace(SamplingParams(), seed=3)
    for body, message in (
        (
            '{"max_new_tokens": 5}',
            r"max_new_tokens is not a field that is supported \(LMDeploy's and SGLang's; here it is max_tokens\)",
        ),
        ('{"temperatur": 5}', r"temperatur is not a field that is supported \(did you mean temperature\?\)"),
        ('{"lora_path": "a"}', r"lora_path is not a field that is supported; start another server"),
    ):
        with pytest.raises(RequestError, match=message):
            read_body(body.encode(), ChatRequest, required=())
