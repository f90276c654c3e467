"""Types, KV caches and forms of weights on a card that is not there: nearly the CPU's numbers, which are those of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checkpoints
from tests.checkpoints import make_checkpoint
from tests.engine.reference import engine, prompt, tokens
from tests.kernels.bfloat16 import compute_bfloat16
from tests.llm.mxfp4 import to_mxfp4
from tests.llm.quantised import Recipe, awq, compressed, fp8, gptq, int8, rewrite
from tests.rehearsal.cuda import A100
from tests.rehearsal.engines import TEMPLATE, Answers, Asked, Rig, serve
from vlserve.config import SamplingParams
from vlserve.kernels import int4, int4_pairs
from vlserve.kernels.experts import Fp8Experts, PairedExperts
from vlserve.kernels.int4_pairs import PairedWeights
from vlserve.llm import formats_int4, stacked_experts
from vlserve.llm.experts import Experts
from vlserve.llm.formats_8bit import Fp8Format, Int8Format

OPTIONS: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 16, "block_size": 8}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
NEAR = 0.15  # of a log-probability, in 16 bits and beside weights in 8 or 4
DENSE: dict[str, dict[str, Any]] = {
    "float32, int8 cache": {"dtype": "float32", "kv_cache_dtype": "int8"},
    "float16, fp8 cache, 8-bit head": {"dtype": "float16", "kv_cache_dtype": "fp8", "lm_head_bits": 8},
    "bfloat16, int8 cache, eager": {"dtype": "bfloat16", "kv_cache_dtype": "int8", "enforce_eager": True},
    "bfloat16, fp8 cache by bits": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
}
MOE = TEXT | {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2}
# in float16, but where a format asks for another type
QUANTISED: dict[str, Recipe] = {
    "awq": awq(32),
    "awq, a group a row": awq(-1),
    "awq, groups of 16": awq(16),  # which are not put in pairs
    "gptq, desc_act": gptq(32, symmetric=False, desc_act=True),
    "compressed int4": compressed(32, symmetric=True),
    "fp8 blocks": fp8("block", (32, 32)),
    "fp8 a tensor": fp8("tensor"),
    "int8": int8(),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "TILE", 14)
        patch.setattr(checkpoints, "CHAT_TEMPLATE", TEMPLATE)
        return make_checkpoint(tmp_path_factory.mktemp("dense"), **TEXT)


@pytest.fixture(autouse=True)
def _numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_bfloat16(monkeypatch)


def asked(folder: Path) -> list[Asked]:
    """Of a few rows and of many."""
    return [(prompt(folder, text), SamplingParams(logprobs=2), 3) for text in ("How many?", "Hi")]


def near(got: Answers, want: Answers) -> None:
    """The same tokens, up to where the likeliest two are nearly as likely."""
    for id, events in want.items():
        for mine, theirs in zip(got[id], events, strict=True):
            assert mine.logprob is not None and theirs.logprob is not None
            if mine.token_id != theirs.token_id:
                (_, first), (_, second) = theirs.logprob.top
                assert first - second < NEAR, (tokens(got[id]), tokens(events))
                break
            assert abs(mine.logprob.logprob - theirs.logprob.logprob) < NEAR


@pytest.mark.parametrize("name", DENSE)
def test_types_and_caches(rig: Rig, dense: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "by bits" in name:  # as on a card that does not read E4M3 itself
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: A100.capability)
    ours = rig.engine(dense, **OPTIONS, **DENSE[name])
    got = rig.serve(ours, asked(dense))
    near(got, serve(engine(dense, device="cpu", **OPTIONS), asked(dense)))


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights(rig: Rig, dense: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of few rows, and of more than 4, for which weights are spread out as otherwise for more than 128."""
    monkeypatch.setattr(int4, "DENSE_ROWS", 5)
    for module in (formats_int4, int4_pairs):
        monkeypatch.setattr(module, "ROWS", 4)
    folder, meant = rewrite(dense, tmp_path, QUANTISED[name])
    ours = rig.engine(folder, **OPTIONS, dtype="float16")
    formats = [linear.format for _, linear in ours.runner.model.decoder.linears()]
    if name.startswith("fp8") or name == "int8":
        assert all(isinstance(one, (Fp8Format, Int8Format)) and one.weight is None for one in formats)
    else:
        paired = [isinstance(one.packed, PairedWeights) for one in formats]  # type: ignore[attr-defined]
        assert paired == [name != "awq, groups of 16"] * len(paired)
    near(rig.serve(ours, asked(folder)), serve(engine(meant, device="cpu", **OPTIONS), asked(folder)))


@pytest.mark.parametrize("name", ("awq", "fp8 blocks"))
def test_experts(rig: Rig, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 as it is published. Blocks of sizes that only larger steps make are launched before the first request as well."""
    monkeypatch.setattr(checkpoints, "TILE", 14)
    monkeypatch.setattr(checkpoints, "CHAT_TEMPLATE", TEMPLATE)
    recipe = QUANTISED[name] if name == "awq" else fp8("block", (128, 128))
    folder, meant = rewrite(make_checkpoint(tmp_path / "dense", "qwen3_moe", **MOE), tmp_path, recipe)
    launched: list[object] = []
    monkeypatch.setattr(stacked_experts, "launch_all", lambda weights, **given: launched.append((weights, given["most_tokens"])))
    ours = rig.engine(folder, **OPTIONS, dtype="float16")
    (experts,) = [layer.feed_forward for layer in ours.runner.model.decoder.decoder_layers]
    assert isinstance(experts, Experts)
    kind = PairedExperts if name == "awq" else Fp8Experts
    assert all(isinstance(part.weights, kind) for part in (experts.gate_up, experts.down))
    assert launched == [(part.weights, OPTIONS["max_num_batched_tokens"]) for part in (experts.gate_up, experts.down)]
    near(rig.serve(ours, asked(folder)[:1]), serve(engine(meant, device="cpu", **OPTIONS), asked(folder)[:1]))


def test_gpt_oss_in_mxfp4(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys and values in 8 bits."""
    monkeypatch.setattr(checkpoints, "TILE", 14)
    monkeypatch.setattr(checkpoints, "CHAT_TEMPLATE", TEMPLATE)
    shape = {"num_hidden_layers": 2, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    source = make_checkpoint(tmp_path / "source", "gpt_oss", **shape)
    packed, meant = (to_mxfp4(source, tmp_path / str(dense), dense=dense) for dense in (False, True))
    ours = rig.engine(packed, **OPTIONS, dtype="bfloat16", kv_cache_dtype="fp8")
    near(rig.serve(ours, asked(packed)[:1]), serve(engine(meant, device="cpu", **OPTIONS), asked(packed)[:1]))
