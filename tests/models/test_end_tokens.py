"""Every place of a checkpoint that names an end counts, in the forms that published files have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import edit_json
from tests.prompt.test_build import copy_of
from vlserve import VLPipeline
from vlserve.errors import ModelError
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.end_tokens import find_end_tokens

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], set[int]]] = {
    # config.json, generation_config.json, tokenizer_config.json
    "InternVL3-hf": ({"text_config": {"eos_token_id": 15}}, {"_from_model_config": True}, {"eos_token": "<|im_end|>"}, {15}),
    "InternVL3": ({"eos_token_id": None, "text_config": {"eos_token_id": 13}}, {}, {"eos_token": "<|im_end|>"}, {13, 15}),
    "InternVL3-9B-hf": ({"text_config": {"eos_token_id": 2}}, {"eos_token_id": 12}, {"eos_token": "</s>"}, {2, 12}),
    "InternVL2_5-38B": ({"text_config": {"eos_token_id": 15}}, {"eos_token_id": [14, 15]}, {}, {14, 15}),
    "MPO": ({}, {"eos_token_id": 13}, {"eos_token": "<|im_end|>"}, {13, 15}),
    "Qwen3-VL": ({"text_config": {"eos_token_id": 15}}, {"eos_token_id": [15, 13]}, {"eos_token": "<|im_end|>"}, {13, 15}),
    "Qwen3.5": ({"text_config": {"eos_token_id": 13}}, {}, {"eos_token": "<|im_end|>"}, {13, 15}),
    "gemma": ({"eos_token_id": [1, 6], "text_config": {}}, {}, {"eos_token": "<eos>"}, {1, 6}),
    "Llama-2": (
        {},
        {"eos_token_id": 2},
        {"eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True}, "pad_token": None},
        {2},
    ),
    "llava-1.5": ({"text_config": {"model_type": "llama"}}, {"eos_token_id": 2}, {"eos_token": "</s>"}, {2}),
    "gpt-oss": ({"model_type": "gpt_oss", "eos_token_id": 16}, {"eos_token_id": [16, 13]}, {}, {13, 16, 17}),
    "InternVL3_5-GPT-OSS": ({"text_config": {"model_type": "gpt_oss"}}, {"eos_token_id": 16}, {}, {16, 17}),
    "nothing": ({"eos_token_id": None}, {"eos_token_id": -1}, {"eos_token": None}, set()),
    "unknown": ({"text_config": None}, {"eos_token_id": []}, {"eos_token": "<|nowhere|>"}, set()),
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"</s>": 2, "<eos>": 1}, "merges": []},
    "added_tokens": [
        {"id": 13, "content": "<|endoftext|>", "special": True},
        {"id": 14, "content": "<|im_start|>", "special": True},
        {"id": 15, "content": "<|im_end|>", "special": True},
        {"id": 16, "content": "<|return|>", "special": True},
        {"id": 17, "content": "<|call|>", "special": True},
        {"id": 18, "content": "<|end|>", "special": True},
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_every_named_end_counts(case: str, tmp_path: Path) -> None:
    config, generation, tokenizer, want = CASES[case]
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert find_end_tokens(tmp_path, config, generation) == want


def test_an_older_file_of_special_tokens_counts_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}}))
    assert find_end_tokens(tmp_path, {}, {}) == {15}


@pytest.mark.parametrize("value", ["<|im_end|>", [2, "3"], True, 2.0, {"id": 2}])
def test_a_value_that_is_no_id_is_named(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json: text_config.eos_token_id is .* expected a token id"):
        find_end_tokens(tmp_path, {"text_config": {"eos_token_id": value}}, {})


def test_each_of_them_ends_an_answer(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """generation_config.json names <|endoftext|>, the tokenizer <|im_end|>, and config.json one beyond the vocabulary."""
    folder = copy_of(checkpoint(), tmp_path)
    ends = {token["content"]: token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    edit_json(folder / "generation_config.json", eos_token_id=[ends["<|endoftext|>"]])
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config=config["text_config"] | {"eos_token_id": 10**6})
    assert read_checkpoint(folder).end_token_ids == {ends["<|endoftext|>"], ends["<|im_end|>"], 10**6}
    with VLPipeline(str(folder), device="cpu", dtype="float32", max_num_seqs=2, kv_cache_gib=0.01) as pipe:
        for name in ("<|endoftext|>", "<|im_end|>"):
            answer = pipe("hi", max_tokens=5, logit_bias={ends[name]: 100.0})
            assert answer.token_ids == (ends[name],) and answer.finish_reason == "stop"
            going_on = pipe("hi", max_tokens=5, logit_bias={ends[name]: 100.0}, ignore_eos=True)
            assert len(going_on.token_ids) == 5 and going_on.finish_reason == "length"
            later = pipe("hi", max_tokens=5, logit_bias={ends[name]: 100.0}, min_tokens=2)
            assert later.token_ids[2:] == (ends[name],) and ends[name] not in later.token_ids[:2]
        assert pipe("hi", structured={"choice": ["yes"]}).text == "yes"
