"""Quantised checkpoints answer as the dense model of their dequantised weights does, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.engine.ranks import tp_engine
from tests.engine.reference import Ties, add, engine, prompt, run
from tests.llm.quantised import Recipe, awq, compressed, fp8, gptq, int8, rewrite
from tests.vision.test_preprocess import noise
from vlserve.commands.shard import shard
from vlserve.config import EngineConfig, SamplingParams
from vlserve.engine.engine import Engine
from vlserve.engine.messages import TokenEvent
from vlserve.errors import ConfigError
from vlserve.models.checkpoint import read_checkpoint
from vlserve.plan.divisibility import check_tp

Make = Callable[..., Path]
# of four ranks, each begins within a group; 176 / 4 = 44 rows begin within a word too
TEXT = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
TEXT |= {"num_hidden_layers": 2}
FORMATS: dict[str, Recipe] = {
    "awq": awq(16),
    "gptq": gptq(16, symmetric=False),
    "compressed": compressed(16, symmetric=True),
    "fp8": fp8("block", (32, 32)),
    "int8": int8(),
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


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_answers_as_its_dequantised_weights(name: str, checkpoint: Make, tmp_path: Path) -> None:
    """The configuration is at the top of config.json or in its text_config."""
    section = "text_config" if name == "awq" else None
    folder, meant = rewrite(checkpoint("qwen3", **TEXT), tmp_path, FORMATS[name], section=section)
    want = answers(engine(meant), folder)
    for tp in (1, 2, 4):
        with tp_engine(folder, tp, replicate_kv_heads=True) as (ours, _):
            same(answers(ours, folder), want)


def test_a_quantised_checkpoint_is_not_sharded(checkpoint: Make, tmp_path: Path) -> None:
    folder, _ = rewrite(checkpoint("qwen3", **TEXT), tmp_path, FORMATS["awq"])
    with pytest.raises(ConfigError, match="is quantised .awq int4, groups of 16., and only unquantised checkpoints are sharded"):
        shard(EngineConfig(model=str(folder), tp=2), tmp_path / "out")


def test_reordered_inputs_allow_one_rank_only(checkpoint: Make, tmp_path: Path) -> None:
    folder, _ = rewrite(checkpoint("qwen3", **TEXT), tmp_path, gptq(16, desc_act=True))
    config = read_checkpoint(folder).config
    check_tp(config, 1)
    with pytest.raises(
        ConfigError, match=r"tp=2 does not work: the groups of .* \(desc_act or actorder\).*Degrees that work: 1\."
    ):
        check_tp(config, 2)
