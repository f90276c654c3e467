"""Every rank reads its part of a quantised decoder bit for bit, wherever shares begin; what does not fit is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.llm.parts import build, full_shapes, splits
from tests.llm.quantised import Recipe, Tensors, awq, compressed, fp8, gptq, int8
from vlserve.kernels.int4.reference import awq_dequantize_ref
from vlserve.llm.config_readers import read_decoder_config
from vlserve.llm.decoder import Decoder
from vlserve.llm.detect_formats import StoredTensors, use_stored_formats
from vlserve.llm.formats_int4 import GroupedInt4Format
from vlserve.llm.quantisation import find_quantisation, grouped
from vlserve.llm.tensor_parallel import Split
from vlserve.llm.weights import load_weights
from vlserve.plan import footprint
from vlserve.plan.model_shape import read_decoder_shape

TEXT: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 176,  # of four ranks, each but the first begins within a group and within a word
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
# 7 groups of 128; 231 groups of 128, as in models of 72 thousand million parameters
SEVEN = TEXT | {"hidden_size": 896, "num_attention_heads": 14, "head_dim": 64, "intermediate_size": 128}
MANY = TEXT | {"hidden_size": 128, "head_dim": 16, "num_key_value_heads": 8, "intermediate_size": 29568}
FORMATS: dict[str, Recipe] = {
    "awq gemm": awq(16),
    "awq gemv": awq(16, "gemv"),
    "awq rows": awq(-1),
    "gptq": gptq(16),
    "gptq v2": gptq(16, symmetric=False, written="gptq_v2", says="gptq_v2"),
    "gptq asymmetric": gptq(16, symmetric=False),
    "gptq that is v2": gptq(16, written="gptq_v2"),
    "gptq v2 that is v1": gptq(16, says="gptq_v2"),
    "gptq rows": gptq(-1, desc_act=True),
    "compressed": compressed(16, symmetric=True),
    "compressed asymmetric": compressed(16, symmetric=False),
    "fp8 tensor": fp8("tensor"),
    "fp8 channel": fp8("channel", is_compressed=True),
    "fp8 block": fp8("block", (32, 32)),
    "fp8 odd block": fp8("block", (24, 40)),
    "int8": int8(),
}
LAYER = "model.layers.0."


def save(folder: Path, text: dict[str, Any], recipe: Recipe) -> Tensors:
    """Write a quantised decoder; returns the weights that it stands for."""
    stored, meant = Tensors(), Tensors()
    for name, shape in full_shapes(build(text, Split())).items():
        meant[name] = torch.randn(shape)
        if name.endswith("_proj.weight"):
            parts, meant[name] = recipe.write(meant[name])
            stored |= {name.removesuffix("weight") + key: value.contiguous() for key, value in parts.items()}
        else:
            stored[name] = meant[name]
    save_file(stored, folder / "model.safetensors")
    return meant


def load(folder: Path, text: dict[str, Any], split: Split, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = prepare(folder, text, split, config, dtype)
    load_weights(folder, decoder.targets())
    decoder.finish()
    return decoder


def prepare(folder: Path, text: dict[str, Any], split: Split, config: dict[str, Any], dtype: torch.dtype) -> Decoder:
    """With its formats, and no weights yet; what is never written stays NaN."""
    with torch.device("meta"):
        decoder = Decoder(read_decoder_config(text), split).to(dtype)
    with StoredTensors(folder, lambda name: name) as tensors:
        use_stored_formats(decoder, "", tensors, find_quantisation({"quantization_config": config}), dtype)
    decoder = decoder.to_empty(device="cpu")
    for parameter in decoder.parameters():
        parameter.data.view(torch.uint8).fill_(255)
    return decoder


def weight(form: Any) -> torch.Tensor:
    """[N, K] of this rank's inputs; without `forward` where its matrix would be large."""
    if form.in_span.size <= 1024:
        return form(torch.eye(form.in_span.size)).t()
    held = form.packed or form  # where a CPU has put them in its own order
    return awq_dequantize_ref(held.codes, held.scales, held.zeros)[:, form.front : form.front + form.in_span.size]


def check(folder: Path, text: dict[str, Any], recipe: Recipe, tp: int) -> list[Decoder]:
    """Every layer of every rank is its part of the whole, and what is beyond the end is zero."""
    meant = save(folder, text, recipe)
    ranks = [load(folder, text, split, recipe.config) for split in splits(tp, replicate_kv_heads=True)]
    for decoder in ranks:
        for names, linear in decoder.linears():
            form = linear.format
            held = weight(form).split([span.size for span, _ in form.outputs.values()])
            for (name, (span, _)), rows in zip(form.outputs.items(), held, strict=True):
                part = meant[f"{names}{name}.weight"][span.start : span.stop, form.in_span.start : form.in_span.stop]
                kept = rows[: part.shape[0], : part.shape[1]]
                assert torch.equal(kept, part), f"{names}{name} of rank {decoder.split.group.rank}"
                assert not rows[part.shape[0] :].any()
    return ranks


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("tp", (1, 2, 4, 8))
def test_each_rank_has_its_part(form: str, tp: int, tmp_path: Path) -> None:
    ranks = check(tmp_path, TEXT, FORMATS[form], tp)
    assert len({tuple((p.shape, p.dtype) for p in decoder.parameters()) for decoder in ranks}) == 1


@pytest.mark.parametrize("text,tp,group", [(SEVEN, 2, 64), (MANY, 2, 128), (MANY, 4, 128), (MANY, 8, 128)])
def test_groups_that_do_not_divide(text: dict[str, Any], tp: int, group: int, tmp_path: Path) -> None:
    ranks = check(tmp_path, text, awq(128), tp)
    forms = [linear.format for _, linear in ranks[-1].linears()]
    form = forms[1 if text is SEVEN else 3]
    assert isinstance(form, GroupedInt4Format) and form.group == group


@pytest.mark.parametrize("form", FORMATS)
def test_the_plan_counts_what_a_rank_holds(form: str, tmp_path: Path) -> None:
    """As it lies on a GPU: on the CPU, eight bits may be converted at the end of loading."""
    config = FORMATS[form].config
    save(tmp_path, TEXT, FORMATS[form])
    shape = read_decoder_shape({"text_config": TEXT, "quantization_config": config})
    for tp in (1, 2, 8):
        for split in splits(tp, replicate_kv_heads=True):
            decoder = prepare(tmp_path, TEXT, split, config, torch.bfloat16)
            held = sum(p.nbytes for p in decoder.parameters()) - decoder.embed_tokens.weight.nbytes
            assert footprint.decoder_bytes(shape, footprint.shard(shape, tp), 2) == held


def test_a_share_is_padded_or_kept_in_finer_groups() -> None:
    assert grouped(896, 128) == (896, 128) and grouped(448, 128) == (448, 64)
    assert grouped(14784, 128) == (14848, 128) and grouped(3696, 128) == (3840, 128)
    assert grouped(44, 16) == (64, 16) and grouped(33, None) == (48, 48)


def test_reordered_inputs_are_put_back(tmp_path: Path) -> None:
    recipe = gptq(32, symmetric=False, desc_act=True)
    text = TEXT | {"intermediate_size": 160, "head_dim": 16, "num_attention_heads": 4}
    check(tmp_path, text, recipe, 1)
    message = r"o_proj: its groups are not of neighbouring inputs .* several ranks cannot share; supported: tp 1"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text, splits(2)[0], recipe.config)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("form", ("awq gemm", "fp8 block", "int8"))
def test_sixteen_bits(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    meant = save(tmp_path, TEXT, FORMATS[form])
    decoder = load(tmp_path, TEXT, Split(), FORMATS[form].config, dtype)
    linear = dict(decoder.linears())[f"{LAYER}mlp."]
    x = torch.randn(5, linear.format.in_features).to(dtype)
    want = x.float() @ meant[f"{LAYER}mlp.down_proj.weight"].t()
    error = (linear.format(x).float() - want).norm() / want.norm()
    assert linear.format(x).dtype == dtype and error < 0.02, error


Edit = Callable[[Tensors, dict[str, Any]], None]


def drop(name: str) -> Edit:
    def edit(tensors: Tensors, config: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.endswith(name)]:
            del tensors[key]

    return edit


def put(name: str, tensor: torch.Tensor) -> Edit:
    return lambda tensors, config: tensors.update({name: tensor})


def say(**changes: Any) -> Edit:
    return lambda tensors, config: config.update(changes)


DOWN = LAYER + "mlp.down_proj"
BAD: list[tuple[str, Edit, str]] = [
    ("awq gemm", say(bits=3), "config.json's quantization_config.bits 3 is not supported; supported: 4"),
    ("awq gemm", say(version="gemv_fast"), "quantization_config.version 'gemv_fast' is not supported; supported: gemm, gemv"),
    ("awq gemm", say(quant_method="aqlm"), "quantization_config.quant_method 'aqlm' is not supported; supported: awq (4 bits"),
    ("awq gemm", say(group_size=48), "group_size 48 does not divide the 64 inputs of model.layers.0.self_attn.q_proj"),
    ("awq gemm", say(group_size=20), "quantization_config.group_size 20 is not supported; supported: multiples of 16, or -1"),
    (
        "awq gemm",
        say(group_size=32),
        "q_proj.qzeros is I32 [4, 12]; config.json's quantization_config says awq int4, groups of 32",
    ),
    (
        "awq gemm",
        say(version="gemv"),
        "q_proj.qweight is I32 [64, 12]; config.json's quantization_config says awq int4, groups of 16",
    ),
    ("awq gemm", drop("down_proj.scales"), f"{DOWN}.scales is missing; config.json's quantization_config says awq int4"),
    ("int8", put(f"{LAYER}self_attn.v_proj.weight", torch.zeros(24, 64)), "q_proj int8, k_proj int8, v_proj dense; projections"),
    (
        "awq gemm",
        put("vision_tower.mlp.fc1.qweight", torch.zeros(2, 2).int()),
        "vision_tower.mlp.fc1.qweight is I32 [2, 2]: only the",
    ),
    ("awq gemm", put("lm_head.weight", torch.zeros(2, 2).to(torch.float8_e4m3fn)), "lm_head.weight is F8_E4M3 [2, 2]: only the"),
    ("awq gemm", put(f"{DOWN}.bias", torch.ones(64)), f"{DOWN}.bias is not zero"),
    ("gptq", say(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported; supported: gptq, gptq_v2"),
    ("gptq", say(dynamic={"+:.*": {"bits": 8}}), "dynamic['+:.*'] sets bits; supported: one format for all quantised layers"),
    ("compressed", put(f"{DOWN}.weight_shape", torch.tensor([64, 175])), f"{DOWN}.weight_shape says [64, 175]"),
    ("compressed", say(format="marlin-24"), "quantization_config.format 'marlin-24' is not supported; supported: pack-quantized"),
    ("fp8 tensor", drop("down_proj.weight_scale"), f"{DOWN}.weight is F8_E4M3 [64, 176], but weight_scale or weight_scale_inv"),
    (
        "fp8 block",
        say(weight_block_size=[16, 32]),
        "q_proj.weight_scale_inv is F32 [3, 2]; config.json's quantization_config says fp8",
    ),
    ("fp8 tensor", say(fmt="e5m2"), "quantization_config.fmt 'e5m2' is not supported; supported: e4m3"),
    ("int8", put(f"{DOWN}.weight", torch.zeros(64, 176, dtype=torch.uint8)), f"{DOWN}.weight is U8 [64, 176]; supported: F32"),
]


@pytest.mark.parametrize("form,edit,message", BAD, ids=range(len(BAD)))
def test_what_does_not_fit_is_named(form: str, edit: Edit, message: str, tmp_path: Path) -> None:
    save(tmp_path, TEXT, FORMATS[form])
    tensors, config = load_file(tmp_path / "model.safetensors"), dict(FORMATS[form].config)
    edit(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, TEXT, Split(), config)


def test_zero_biases_and_scales_of_activations_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, TEXT, FORMATS["fp8 tensor"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"{DOWN}.bias": torch.zeros(64), f"{LAYER}self_attn.k_scale": torch.ones(())}
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path, TEXT, Split(), FORMATS["fp8 tensor"].config)


def test_packed_weights_need_a_configuration(tmp_path: Path) -> None:
    save(tmp_path, TEXT, FORMATS["awq gemm"])
    with pytest.raises(ValueError, match="q_proj is packed, but there is no quantization_config in config.json, its text_config"):
        with torch.device("meta"):
            decoder = Decoder(read_decoder_config(TEXT), Split())
        with StoredTensors(tmp_path, lambda name: name) as tensors:
            use_stored_formats(decoder, "", tensors, None, torch.float32)


def test_the_configuration_is_found_wherever_it_is() -> None:
    given = awq(128).config
    for config in (
        {"quantization_config": given},
        *({key: {"quantization_config": given}} for key in ("text_config", "llm_config")),
    ):
        found = find_quantisation(config)
        assert found is not None and (found.method, found.group_size) == ("awq", 128)
    native = find_quantisation({}, {"quant_config.json": {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}})
    assert native is not None and (native.method, native.group_size, native.version) == ("awq", 64, "gemm")
    old = find_quantisation({}, {"quantize_config.json": {"bits": 4, "group_size": 128, "desc_act": True, "sym": True}})
    assert old is not None and (old.method, old.reordered, old.where) == ("gptq", True, "quantize_config.json")
    assert find_quantisation({"text_config": {}}) is None


def test_layers_left_out() -> None:
    left_out = awq(128).config | {"modules_to_not_convert": ["visual", "layers.1."]}
    found = find_quantisation({"quantization_config": left_out})
    assert found is not None and found.covers("model.layers.0.mlp.up_proj") and not found.covers("model.layers.1.mlp.up_proj")
    ignore = ["lm_head", "re:.*layers\\.2\\.mlp.*", "model.language_model.layers.3.self_attn.o_proj"]
    found = find_quantisation({"quantization_config": compressed(32, symmetric=True).config | {"ignore": ignore}})
    assert found is not None and not found.covers("model.layers.2.mlp.up_proj")
    assert not found.covers("model.layers.3.self_attn.o_proj") and found.covers("model.layers.30.self_attn.o_proj")
