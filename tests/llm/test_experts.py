"""Mixtures of experts: every form of their weights, shared by width or by expert, equals the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.llm.parts import Part
from tests.llm.quantised import Recipe, Tensors
from tests.llm.test_detect_formats import FORMATS, load, prepare, save
from vlserve.llm.config_readers import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.experts import Experts
from vlserve.llm.tensor_parallel import Split

TEXT: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 176,  # of four ranks, each but the first begins within a group and within a word
    "num_experts": 6,  # of four ranks, two have one more than the others
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "mlp_only_layers": [0],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
DENSE = Recipe({}, lambda weight: ({"weight": weight}, weight))
LAYER = "model.layers.1.mlp."
Make = Callable[..., Path]


def splits(tp: int, expert_parallel: bool) -> list[Split]:
    return [Split(group=Part(rank, tp), expert_parallel=expert_parallel) for rank in range(tp)]


def defined(x: torch.Tensor, meant: Tensors, config: dict[str, Any]) -> torch.Tensor:
    """By its description: softmax over all experts, the largest of them, their weights to 1 where the config says so."""
    x, meant = x.double(), {name: tensor.double() for name, tensor in meant.items()}
    out = torch.zeros_like(x)
    for row, probabilities in enumerate((x @ meant[f"{LAYER}gate.weight"].t()).softmax(-1)):
        weights, chosen = probabilities.sort(descending=True)
        weights, chosen = weights[: config["num_experts_per_tok"]], chosen[: config["num_experts_per_tok"]]
        if config.get("norm_topk_prob"):
            weights = weights / weights.sum()
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            gate, up, down = (meant[f"{LAYER}experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            out[row] += weight * (down @ (F.silu(gate @ x[row]) * (up @ x[row])))
    return out


def experts_of(decoder: Decoder) -> Experts:
    experts = decoder.decoder_layers[1].feed_forward
    assert isinstance(experts, Experts)
    return experts


@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("form", ("dense", *(name for name in FORMATS if name != "gptq rows")))
def test_every_form_and_share_is_as_defined(form: str, norm: bool, tmp_path: Path) -> None:
    recipe, text = FORMATS.get(form, DENSE), TEXT | {"norm_topk_prob": norm}
    meant, x = save(tmp_path, text, recipe), torch.randn(5, 64)
    want = defined(x, meant, text)
    for tp, by_expert in ((1, False), (2, False), (4, False), (1, True), (4, True)):
        decoders = [load_own(tmp_path, text, split, recipe.config) for split in splits(tp, by_expert)]
        got = sum(experts_of(decoder)(x, None).double() for decoder in decoders)
        assert (got - want).norm() < 1e-5 * want.norm(), (tp, by_expert)
        numbers = [experts_of(decoder).span.size for decoder in decoders]
        assert numbers == ([6] * tp if not by_expert else {1: [6], 4: [1, 2, 1, 2]}[tp])


def load_own(folder: Path, text: dict[str, Any], split: Split, config: dict[str, Any]) -> Decoder:
    """Without what other ranks have, as a model does it."""
    if not split.expert_parallel and config:
        return load(folder, text, split, config)
    if config:
        whole = prepare(folder, text, Split(), config, torch.float32)
        forms = {names: linear.format for names, linear in whole.linears()}
    with torch.device("meta"):
        decoder = Decoder(read_decoder_config(text), split)
    raise NotImplementedError(forms)
