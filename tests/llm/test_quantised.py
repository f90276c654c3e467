"""Quantised checkpoints answer as the dense model of their dequantised weights does, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.engine.ranks import tp_engine
from tests.engine.reference import Ties, add, engine, prompt, run
from tests.llm.quantised import Recipe, awq, compressed, fp8, gptq, int8, rewrite
from tests.vision.test_preprocess import noise
from vlserve.config import SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.messages import TokenEvent

Make = Callable[..., Path]
# 176 / 4 = 44 starts within groups and words; a KV head of 12 on each of four ranks does so too
TEXT = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
ODD = TEXT | {"intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 24}
FORMS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "awq gemm": (awq(16), TEXT),
    "awq gemm 32": (awq(32), ODD),
    "awq gemv": (awq(32, "gemv"), ODD),
    "awq rows": (awq(-1), TEXT),
    "gptq": (gptq(16), TEXT),
    "gptq v2": (gptq(32, symmetric=False, written="gptq_v2", says="gptq_v2"), ODD),
    "gptq asymmetric": (gptq(16, symmetric=False), TEXT),
    "gptq that is v2": (gptq(16, written="gptq_v2"), TEXT),
    "gptq rows": (gptq(-1, desc_act=True), TEXT),
    "compressed": (compressed(32, symmetric=True), ODD),
    "compressed asymmetric": (compressed(16, symmetric=False), TEXT),
    "fp8 tensor": (fp8("tensor"), TEXT),
    "fp8 channel": (fp8("channel", is_compressed=True), TEXT),
    "fp8 block": (fp8("block", (32, 32)), TEXT),
    "int8": (int8(), TEXT),
}


def answers(ours: Engine, folder: Path) -> dict[int, list[TokenEvent]]:
    pictures = [Image.fromarray(noise(28, 60, seed=i)) for i in range(2)]
    for i, images in enumerate(([], pictures[:1], pictures)):
        add(ours, i, prompt(folder, f"Question {i}?", images), SamplingParams(logprobs=2), 8)
    return run(ours)


def same(got: dict[int, list[TokenEvent]], want: dict[int, list[TokenEvent]]) -> None:
    ties = Ties()
    for id in want:
        ties.same(got[id], want[id])
    ties.check()
    assert ties.largest_logprob_difference < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_every_form_answers_as_its_dequantised_weights(form: str, checkpoint: Make, tmp_path: Path) -> None:
    recipe, text = FORMS[form]
    folder, meant = rewrite(checkpoint("qwen3", **text), tmp_path, recipe)
    want = answers(engine(meant), folder)
    for tp in (1, 2, 4):
        with tp_engine(folder, tp, replicate_kv_heads=True) as (ours, _):
            same(answers(ours, folder), want)
