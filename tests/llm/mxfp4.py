"""GPT-OSS's checkpoints with experts in MXFP4, as published, or with transformers' numbers for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlserve.kernels.experts.reference import E2M1

NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def to_mxfp4(folder: Path, out: Path, *, dense: bool) -> Path:
    """Experts in MXFP4 as published, or with transformers' numbers for that."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shutil.copytree(folder, out)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        blocks, scales = pack(tensor.transpose(1, 2))
        if dense:
            stored[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        else:
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    if not dense:
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = {"modules_to_not_convert": NOT_CONVERTED, "quant_method": "mxfp4"}
        (out / "config.json").write_text(json.dumps(config))
    return out


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [E, N, K] -> blocks [E, N, K/32, 16], scales [E, N, K/32]: the nearest numbers, of a power of two that fits the
    largest."""
    groups = weight.unflatten(-1, (-1, 32))
    scales = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    numbers = groups / scales.exp2()[..., None]
    codes = (numbers[..., None] - torch.tensor(E2M1)).abs().argmin(-1)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8), (scales + 127).to(torch.uint8)
