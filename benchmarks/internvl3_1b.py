"""A checkpoint in the sizes of InternVL3-1B with random weights, and the demo model's tokenizer and pictures.

Every hundredth channel that a norm of the decoder gives is thirty times as large as the others; trained models have such ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vlserve.llm.formats import Slot
from vlserve.llm.tensor_parallel import Split
from vlserve.models.checkpoint import DEMO
from vlserve.models.internvl import INTERNVL

TEXT = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_674,
}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SALIENT_EVERY, SALIENT = 100, 30.0


def make_checkpoint(
    folder: Path,
    seed: int = 0,
    *,
    text: Mapping[str, Any] = TEXT,
    vision: Mapping[str, Any] = VISION,
    salient: float = SALIENT,
) -> Path:
    """Write config.json, tokenizer, processor and model.safetensors in bfloat16 into `folder`; returns it.

    Args:
        salient: how many times as large a hundredth of the channels are that the decoder's norms give.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in DEMO.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((DEMO / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["text_config"] |= {**text, "layer_types": ["full_attention"] * text["num_hidden_layers"]}
    config["vision_config"] |= vision
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        targets = INTERNVL.build(config, INTERNVL.preprocessor(config, {}), Split()).targets()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, target in sorted(targets.items()):
        shape = target.full if isinstance(target, Slot) else tuple(target.shape)
        tensors[name] = random_weight(name, shape, generator, salient).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator, salient: float) -> torch.Tensor:
    """Scaled by fan-in; norms and layer scales are one, and the decoder's norms have salient channels."""
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * torch.Size(shape[1:]).numel() ** -0.5
    if name.endswith("bias"):
        return torch.randn(shape, generator=generator) * 0.02
    weight = torch.ones(shape)
    if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
        weight[torch.randperm(shape[0], generator=generator)[::SALIENT_EVERY]] *= salient
    return weight
