"""Mixtures of experts: every form of their weights, shared by width or by expert, equals the definition in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.llm.parts import Part
from tests.llm.quantised import Recipe, Tensors, gptq
from tests.llm.test_detect_formats import FORMATS, save
from vlserve.kernels.experts import DenseExperts
from vlserve.llm.config_readers import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.experts import Experts, choose
from vlserve.llm.quantisation import find_quantisation
from vlserve.llm.tensor_parallel import Split
from vlserve.models.base import Model

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
Edit = Callable[[Tensors], Any]
aten = torch.ops.aten


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


class Plain(Model):
    def rename(self, name: str) -> str:
        return name


def load(folder: Path, text: dict[str, Any], split: Split, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    """As a rank does it, without what other ranks have; what is never written is no number."""
    with torch.device("meta"):
        model = Plain(Decoder(read_decoder_config(text), split).to(dtype), prefix="")
    model.use_stored_formats(folder, find_quantisation({"quantization_config": config}) if config else None, dtype)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).fill_(255)
    model.load(folder, lambda done, total: None)
    return model.decoder


FORMS = ["awq gemm", "awq rows", "gptq", "compressed asymmetric"]
FORMS += ["fp8 tensor", "fp8 channel", "fp8 block", "fp8 odd block", "int8"]


@pytest.mark.parametrize("form", ("dense", *FORMS))
def test_every_form_and_share_is_as_defined(form: str, tmp_path: Path) -> None:
    recipe, text = FORMATS.get(form, DENSE), TEXT | {"norm_topk_prob": "fp8" not in form}
    meant, x = save(tmp_path, text, recipe), torch.randn(5, 64)
    want = defined(x, meant, text)
    for tp, by_expert in ((1, False), (4, False), (4, True)):
        decoders = [load(tmp_path, text, split, recipe.config) for split in splits(tp, by_expert)]
        got = sum(experts_of(decoder)(x, None).double() for decoder in decoders)
        assert isinstance(got, torch.Tensor) and (got - want).norm() < 1e-5 * want.norm(), (tp, by_expert)
        assert [experts_of(decoder).span.size for decoder in decoders] == ([1, 2, 1, 2] if by_expert else [6] * tp)


@pytest.mark.parametrize("form,dtype", [("dense", torch.bfloat16), ("awq gemm", torch.bfloat16), ("fp8 block", torch.float16)])
def test_sixteen_bits(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    recipe = FORMATS.get(form, DENSE)
    meant, x = save(tmp_path, TEXT, recipe), torch.randn(5, 64).to(dtype)
    meant[f"{LAYER}gate.weight"] = meant[f"{LAYER}gate.weight"].to(dtype)
    got, want = experts_of(load(tmp_path, TEXT, Split(), recipe.config, dtype))(x, None), defined(x, meant, TEXT)
    assert got.dtype == dtype and (got.double() - want).norm() < 0.03 * want.norm()


def test_stacking_takes_no_memory(tmp_path: Path) -> None:
    """The experts' parameters lie in one tensor before they are read, and products use that tensor."""
    save(tmp_path, TEXT, DENSE)
    with torch.device("meta"):
        model = Plain(Decoder(read_decoder_config(TEXT), Split()), prefix="")
    model.to_empty(device="cpu")
    experts = experts_of(model.decoder)
    names, first = next(experts.linears())
    assert names == "mlp.experts.0."
    where, num_bytes = first.format.weight.data_ptr(), sum(p.nbytes for p in experts.parameters())  # type: ignore[attr-defined]
    model.load(tmp_path, lambda done, total: None)
    assert isinstance(experts.gate_up.weights, DenseExperts) and experts.gate_up.weights.weight.data_ptr() == where
    held = sum(part.packed_bytes for part in (experts.gate_up, experts.down)) + sum(p.nbytes for p in experts.parameters())
    assert held == num_bytes and not list(experts.linears())


class BytesRead(TorchDispatchMode):
    """Counts what products read of `weights`."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights, self.num_bytes = weights.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in args if func not in (aten.select.int, aten.t.default, aten.slice.Tensor, aten.view.default) else ():
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() == self.weights:
                self.num_bytes += one.nbytes
        return func(*args, **(kwargs or {}))


def test_a_step_reads_chosen_experts_only(tmp_path: Path) -> None:
    text = TEXT | {"num_experts_per_tok": 2}
    meant, x = save(tmp_path, text, DENSE), torch.randn(2, 64)
    experts = experts_of(load(tmp_path, text, Split(), {}))
    chosen, _ = choose(x @ meant[f"{LAYER}gate.weight"].t(), experts.config)
    for rows in ([0], [0, 1], [1, 1, 1]):
        number = len(chosen[rows].unique())
        assert number in range(2, 5), "some were meant to be left out"
        for part, each in ((experts.gate_up, 2 * 176 * 64 * 4), (experts.down, 64 * 176 * 4)):
            assert isinstance(part.weights, DenseExperts)
            with torch.inference_mode(), BytesRead(part.weights.weight) as read:
                experts(x[rows], None)
            assert read.num_bytes == number * each


def put(name: str, tensor: torch.Tensor | None) -> Edit:
    """None takes the tensor away."""
    return lambda tensors: tensors.pop(name) if tensor is None else tensors.update({name: tensor})


EXPERT = f"{LAYER}experts.2."
BAD: list[tuple[str, Edit, str]] = [
    ("dense", put(f"{EXPERT}up_proj.weight", None), f"weights missing from FOLDER: {EXPERT}up_proj.weight"),
    ("dense", put(f"{LAYER}experts.6.up_proj.weight", torch.zeros(176, 64)), "experts.6.up_proj.weight (not part of this arch"),
    ("dense", put(f"{LAYER}gate.weight", torch.zeros(7, 64)), "gate.weight is [7, 64], config.json asks for [6, 64]"),
    (
        "int8",
        lambda tensors: tensors.update(
            {f"{EXPERT}down_proj.weight": torch.zeros(64, 176)} | {f"{EXPERT}down_proj.weight_scale": torch.ones(64, 1)}
        ),
        f"{LAYER}experts.0.down_proj and {EXPERT}down_proj are stored in different forms; supported: one form for all experts",
    ),
    (
        "order",
        lambda tensors: None,
        "experts.0.gate_proj: its groups are not of neighbouring inputs (desc_act or actorder), ",
    ),
    (
        "awq gemm",
        put(f"{LAYER}gate.qweight", torch.zeros(64, 1).int()),
        f"{LAYER}gate.qweight is I32 [64, 1]: only the decoder's linear layers",
    ),
]


@pytest.mark.parametrize("form,edit,message", BAD, ids=range(len(BAD)))
def test_what_does_not_fit_is_named(form: str, edit: Edit, message: str, tmp_path: Path) -> None:
    recipe = {**FORMATS, "dense": DENSE, "order": gptq(16, desc_act=True)}[form]
    save(tmp_path, TEXT, recipe)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message.replace("FOLDER", tmp_path.name))):
        load(tmp_path, TEXT, Split(), recipe.config)


def test_each_rank_needs_an_expert() -> None:
    spans = [split.experts(5) for split in splits(3, expert_parallel=True)]
    assert [(span.start, span.stop) for span in spans] == [(0, 1), (1, 3), (3, 5)]
    with pytest.raises(ValueError, match="num_experts 5 is less than tp 6"):
        splits(6, expert_parallel=True)[0].experts(5)
