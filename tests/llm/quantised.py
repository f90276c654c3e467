"""Rewrites a dense checkpoint with its decoder quantised, in each layout, and dense with the weights that this stands for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vlserve.llm.int4_packing import pack_awq, pack_compressed, pack_gptq

LINEAR = re.compile(
    r"(language_model\.)?model\.layers\.\d+\.((self_attn|mlp|mlp\.experts\.\d+)\.\w+_proj|attention\.(wqkv|wo)|feed_forward\.w\d)\.weight"
)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """`write` makes of a weight (the tensors to store, the weight that they stand for); `config` is the quantization_config."""

    config: dict[str, Any]
    write: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def round_to_groups(weight: torch.Tensor, group: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scales in float16, zeros), a scale for each `group` inputs."""
    parts = weight.unflatten(1, (-1, group))
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scales = (parts.abs().amax(-1) / 7 if symmetric else (high - low) / 15).half()
    zeros = torch.full_like(low, 8) if symmetric else (-low / scales.float()).round().clamp(1, 15)
    codes = (parts / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 15)
    return codes.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8)


def expand(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    group = codes.shape[1] // scales.shape[1]
    return (codes.float() - zeros.float().repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)


def awq(group: int, version: str = "gemm") -> Recipe:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts = round_to_groups(weight, group if group > 0 else weight.shape[1], symmetric=False)
        return pack_awq(*parts, version=version), expand(*parts)

    return Recipe({"quant_method": "awq", "bits": 4, "group_size": group, "version": version, "zero_point": True}, write)


def gptq(group: int, *, symmetric: bool = True, written: str = "gptq", says: str = "gptq", desc_act: bool = False) -> Recipe:
    """`written` is how zero points are stored, `says` what the config calls it."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        columns = weight.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns)) if desc_act else torch.arange(columns)
        codes, scales, zeros = round_to_groups(weight[:, order], group if group > 0 else columns, symmetric=symmetric)
        g_idx = torch.empty(columns, dtype=torch.int32)
        g_idx[order] = (torch.arange(columns) // (columns // scales.shape[1])).int()
        back = torch.empty_like(weight).index_copy_(1, order, expand(codes, scales, zeros))
        stored = torch.empty_like(codes).index_copy_(1, order, codes)
        in_order = stored[:, g_idx.long().argsort(stable=True)]
        return pack_gptq(in_order, scales, zeros, g_idx, version=written), back

    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "desc_act": desc_act}
    return Recipe(config | {"checkpoint_format": says}, write)


def compressed(group: int, *, symmetric: bool) -> Recipe:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts = round_to_groups(weight, group, symmetric=symmetric)
        return pack_compressed(parts[0], parts[1], None if symmetric else parts[2]), expand(*parts)

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    return Recipe(compressed_config("pack-quantized", weights), write)


def compressed_config(written: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": written, "config_groups": groups, "ignore": ["lm_head"]}


def fp8(strategy: str, block: tuple[int, int] | None = None, *, is_compressed: bool = False) -> Recipe:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        spread, scales = _scales(weight, strategy, block, 448.0)
        codes = (weight / spread).to(torch.float8_e4m3fn)
        name = "weight_scale" if block is None else "weight_scale_inv"
        extra = {"input_scale": torch.ones(1)} if strategy == "tensor" else {}
        return {"weight": codes, name: scales, **extra}, codes.float() * spread

    if is_compressed:
        return Recipe(compressed_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": strategy}), write)
    return Recipe({"quant_method": "fp8", **({"weight_block_size": list(block)} if block else {})}, write)


def int8(strategy: str = "channel") -> Recipe:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        spread, scales = _scales(weight, strategy, None, 127.0)
        codes = (weight / spread).round().to(torch.int8)
        return {"weight": codes, "weight_scale": scales}, codes.float() * spread

    return Recipe(compressed_config("int-quantized", {"num_bits": 8, "type": "int", "strategy": strategy}), write)


def _scales(weight: torch.Tensor, strategy: str, block: tuple[int, int] | None, most: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(a scale for each weight, the scales as stored)."""
    if strategy == "tensor":
        scales = weight.abs().amax().reshape(1) / most
        return scales.expand_as(weight), scales
    if strategy == "channel":
        scales = weight.abs().amax(1, keepdim=True) / most
        return scales.expand_as(weight), scales
    assert block is not None
    rows, columns = (torch.arange(size) // width for size, width in zip(weight.shape, block, strict=True))
    scales = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
    for i, j in ((i, j) for i in range(scales.shape[0]) for j in range(scales.shape[1])):
        scales[i, j] = weight[rows == i][:, columns == j].abs().amax() / most
    return scales[rows][:, columns], scales


def rewrite(dense: Path, out: Path, recipe: Recipe, *, section: str | None = None) -> tuple[Path, Path]:
    """(the quantised checkpoint, the dense one that it stands for); `section` of config.json takes the configuration."""
    quantised, meant = out / "quantised", out / "meant"
    shutil.copytree(dense, quantised), shutil.copytree(dense, meant)
    stored, equal = Tensors(), Tensors()
    for name, tensor in load_file(dense / "model.safetensors").items():
        stored[name] = equal[name] = tensor
        if LINEAR.fullmatch(name):
            parts, equal[name] = recipe.write(tensor)
            del stored[name]
            stored |= {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(equal, meant / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    place = config if section is None else config[section]
    place["quantization_config"] = recipe.config
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, meant
