"""The walk through the blocks computes what timm's own does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from vlserve.vision.config import EncoderConfig
from vlserve.vision.internvit_encoder import build_encoder

CONFIG = EncoderConfig(
    image_size=28,
    patch_size=14,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    attention_bias=True,
    use_qk_norm=False,
    norm_type="layer_norm",
    layer_norm_eps=1e-6,
    downsample_ratio=0.5,
)


@pytest.mark.parametrize("layers", (1, 3))
@pytest.mark.parametrize("norm_type", ("layer_norm", "rms_norm"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@torch.inference_mode()
def test_the_blocks_are_timms(norm_type: str, layers: int, dtype: torch.dtype) -> None:
    config = replace(CONFIG, norm_type=norm_type, use_qk_norm=norm_type == "rms_norm", num_hidden_layers=layers)
    encoder = build_encoder(config).to(dtype)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, config.hidden_size).to(dtype)
    want = x
    for block in encoder.blocks:
        want = block(want)
    assert torch.equal(encoder.blocks(x), want)
