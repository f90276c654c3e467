"""InternVL as others publish it in few bits: the names, keys and places of each tool's files, at every degree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import edit_json
from tests.engine.ranks import tp_engine
from tests.engine.reference import ask, engine, prompt
from tests.llm.quantised import Recipe, awq, compressed, compressed_config, fp8, gptq, int8, rewrite
from tests.original_format import make_original
from tests.vision.test_preprocess import noise

Make = Callable[..., Path]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
IGNORED = ["re:.*lm_head", "re:vision_model.*", "re:mlp1.*", "language_model.lm_head"]  # llm-compressor's recipes
# LMDeploy and OpenGVLab
LMDEPLOY = {"bits": 4, "group_size": 16, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm"}
AUTOAWQ = {"quant_method": "awq", "zero_point": True, "group_size": 16, "bits": 4, "version": "gemm"}
# optimum's, which ms-swift writes with
SWIFT = {
    "backend": "auto",
    "batch_size": 1,
    "bits": 4,
    "block_name_to_quantize": "language_model.model.layers",
    "cache_block_outputs": True,
    "checkpoint_format": "gptq",
    "damp_percent": 0.1,
    "dataset": None,
    "desc_act": False,
    "exllama_config": {"version": 1},
    "group_size": 16,
    "max_input_length": None,
    "meta": {"quantizer": ["optimum:1.24.0", "gptqmodel:2.2.0"]},
    "model_seqlen": None,
    "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": None,
    "pad_token_id": None,
    "quant_method": "gptq",
    "sym": True,
    "tokenizer": None,
    "true_sequential": True,
    "use_cuda_fp16": False,
}
GPTQMODEL = {
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": True,
    "dynamic": {"-:^vision_model\\.": {}, "-:^mlp1\\.": {}},
    "group_size": 16,
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:4.0.0"], "static_groups": False},
    "pack_dtype": "int32",
    "quant_method": "gptq",
    "sym": True,
}
FP8_BY_TRANSFORMERS = {"activation_scheme": "dynamic", "modules_to_not_convert": ["vision_model", "mlp1", "lm_head"]}


def says(recipe: Recipe, config: dict[str, Any]) -> Recipe:
    return replace(recipe, config=config)


def ignoring(recipe: Recipe) -> Recipe:
    return says(recipe, recipe.config | {"ignore": IGNORED, "quantization_status": "compressed", "kv_cache_scheme": None})


def fp8_in_blocks(*block: int) -> Recipe:
    recipe = fp8("block", (block[0], block[1]))
    return says(recipe, recipe.config | FP8_BY_TRANSFORMERS)


def symmetric_awq(*, has_zeros: bool) -> Recipe:
    """`zero_point` false: with zero points that are all eight, as AutoRound writes, or with none."""
    written = compressed(16, symmetric=True).write

    def write(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        from tests.llm.quantised import round_to_groups
        from vlserve.llm.int4_packing import pack_awq

        tensors = pack_awq(*round_to_groups(weight, 16, symmetric=True))
        return {name: t for name, t in tensors.items() if has_zeros or name != "qzeros"}, written(weight)[1]

    return Recipe(LMDEPLOY | {"zero_point": False}, write)


def ordered_by_activation() -> Recipe:
    """compressed-tensors with `actorder: group`, which stores the group of each input."""
    ordered = gptq(16, desc_act=True)

    def write(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        from vlserve.llm.int4_packing import MIDDLE, input_order, pack_compressed, unpack_gptq

        stored, meant = ordered.write(weight)
        g_idx = stored["g_idx"]
        codes, scales, zeros = unpack_gptq(stored["qweight"], stored["qzeros"], stored["scales"], g_idx, version="gptq")
        order = input_order(g_idx, 16)
        assert order is not None and bool((zeros == MIDDLE).all())
        packed = pack_compressed(torch.empty_like(codes).index_copy_(1, order, codes), scales, None)
        return packed | {"weight_g_idx": g_idx}, meant

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16, "actorder": "group"}
    return Recipe(compressed_config("pack-quantized", weights), write)


TWICE = "twice"  # at the top of config.json and in llm_config, as OpenGVLab's own AWQ editions
EDITIONS: dict[str, tuple[str, Recipe, str | None]] = {
    "LMDeploy, InternLM2": ("internlm2", says(awq(16), LMDEPLOY | {"zero_point": True}), "llm_config"),
    "LMDeploy, Qwen3": ("qwen3", says(awq(16), LMDEPLOY | {"zero_point": True}), TWICE),
    "AutoRound, without zero points": ("internlm2", symmetric_awq(has_zeros=False), None),
    "AutoRound, with zero points": ("phi3", symmetric_awq(has_zeros=True), None),
    "AutoAWQ, gemv": ("internlm2", says(awq(16, "gemv"), AUTOAWQ | {"version": "gemv"}), None),
    "ms-swift, GPTQ": ("internlm2", says(gptq(16), SWIFT), None),
    "GPTQModel, by activation": ("phi3", says(gptq(16, desc_act=True), GPTQMODEL), None),
    "compressed, by activation": ("internlm2", ordered_by_activation(), None),
    "compressed, 4 bits": ("internlm2", ignoring(compressed(16, symmetric=False)), None),
    "compressed, FP8": ("phi3", ignoring(fp8("channel", is_compressed=True)), None),
    "compressed, int8": ("internlm2", ignoring(int8()), None),
    "FP8 of a tensor": ("internlm2", says(fp8("tensor"), {"quant_method": "fp8", "activation_scheme": "static"}), None),
    "FP8 in blocks, InternLM2": ("internlm2", fp8_in_blocks(8, 16), None),
    "FP8 in blocks, Phi-3": ("phi3", fp8_in_blocks(16, 32), None),
}

AT_TWO = ("LMDeploy, InternLM2", "ms-swift, GPTQ", "compressed, 4 bits", "compressed, FP8", "FP8 in blocks, InternLM2")


@pytest.mark.parametrize("name", EDITIONS)
def test_an_edition_answers_as_its_dequantised_weights(name: str, checkpoint: Make, tmp_path: Path) -> None:
    """Degree 4 has copies of the two key-value heads; groups ordered by activation allow one rank. Degree 2, which splits less,
    is for an edition of each way to cut."""
    decoder, recipe, section = EDITIONS[name]
    is_llama = decoder == "internlm2"
    dense = make_original(
        checkpoint("llama" if is_llama else decoder, **SMALL), tmp_path / "model", decoder=decoder if is_llama else None
    )
    folder, meant = rewrite(dense, tmp_path / "weights", recipe, section=None if section == TWICE else section)
    if section == TWICE:
        llm = json.loads((folder / "config.json").read_text())["llm_config"]
        edit_json(folder / "config.json", llm_config=llm | {"quantization_config": recipe.config})
    (folder / "args.json").write_text(json.dumps({"model": "elsewhere", "quant_method": "gptq", "quant_bits": 4}))  # ms-swift's
    prompts = [prompt(folder, "What shapes are there?", [Image.fromarray(noise(60, 30))]), prompt(folder, "Hello!")]
    wanted = ask(engine(meant), prompts, 6)
    for tp in (1,) if "by activation" in name else (1, 2, 4) if name in AT_TWO else (1, 4):
        with tp_engine(folder, tp, replicate_kv_heads=True) as (ours, _):
            assert ask(ours, prompts, 6) == wanted, tp
