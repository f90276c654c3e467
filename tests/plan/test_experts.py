"""Bytes of quantised experts, planned and held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.ranks import tp_engine
from tests.engine.test_gpt_oss import RANKS, to_mxfp4
from tests.llm.test_detect_formats import FORMATS, prepare, save
from tests.llm.test_experts import TEXT, splits
from tests.original_format import make_text
from vlserve.engine.memory import weight_bytes
from vlserve.plan import footprint
from vlserve.plan.model_shape import read_decoder_shape
from vlserve.plan.tp_plan import make_plan


@pytest.mark.parametrize("form", FORMATS)
def test_quantised_experts_are_counted(form: str, tmp_path: Path) -> None:
    """As they lie on a GPU; a layer of the two is dense."""
    config = FORMATS[form].config
    save(tmp_path, TEXT, FORMATS[form])
    shape = read_decoder_shape({"text_config": TEXT, "quantization_config": config})
    for tp in (1, 2, 4):
        for split in splits(tp, expert_parallel=False):
            decoder = prepare(tmp_path, TEXT, split, config, torch.bfloat16)
            held = sum(p.nbytes for p in decoder.parameters()) - decoder.embed_tokens.weight.nbytes
            assert footprint.decoder_bytes(shape, footprint.shard(shape, tp, split.group.rank), 2) == held


@pytest.mark.parametrize("options", [{"tp": 1}, {"tp": 2}, {"tp": 2, "expert_parallel": True}], ids=str)
def test_mxfp4_is_counted(options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """With sinks, and biases of experts that the first rank alone adds."""
    folder = to_mxfp4(make_text(checkpoint("gpt_oss", **RANKS), tmp_path / "text"), tmp_path / "packed", dense=False)
    plan = make_plan(json.loads((folder / "config.json").read_text()), dtype="float32", **options)
    with tp_engine(folder, **options) as (_, runners):
        for runner, rank in zip(runners, plan.ranks, strict=True):
            held = weight_bytes(runner.model)
            assert (rank.vision_bytes, rank.decoder_bytes, rank.embedding_bytes) == tuple(held.values())
    assert plan.supported and plan.notes == ("the decoder's linear layers are counted as mxfp4",)
