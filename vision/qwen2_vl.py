"""Qwen2-VL's vision encoder. Source: Qwen2VisionTransformerPretrainedModel of transformers, by whose names its parameters go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vlserve.vision.native_config import NativeConfig
from vlserve.vision.native_tower import Block, Grid, NativeTower, whole_units
from vlserve.vision.qwen_config import QwenVisionConfig


class Qwen2VLTower(NativeTower):
    """Layers with LayerNorm and quick GELU, each of which sees all of a picture."""

    def __init__(self, config: QwenVisionConfig, image: NativeConfig) -> None:
        super().__init__(config, image)
        width, inner = config.width, config.intermediate_size
        self.blocks = nn.ModuleList(Block(config, nn.LayerNorm, QuickMLP(width, inner)) for _ in range(config.depth))
        self.merger = Merger(config, nn.LayerNorm)

    def features(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        cos_sin, whole = self.cos_sin(self.rows_and_columns(grids, x.device)), whole_units(grids)
        for block in self.blocks:
            x = block(x, cos_sin, whole)
        return self.merger(x).unsqueeze(1)


class QuickMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x)"""
    return (1.702 * x).sigmoid_().mul_(x)


class Merger(nn.Module):
    """The patches of a feature side by side, through two layers: [P, C] -> [F, O]."""

    def __init__(self, config: QwenVisionConfig, norm: type[nn.LayerNorm | nn.RMSNorm]) -> None:
        super().__init__()
        self.inner = config.width * config.spatial_merge_size**2
        self.ln_q = norm(config.width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.inner, self.inner), nn.GELU(), nn.Linear(self.inner, config.out_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.inner))
