"""Qwen2.5-VL's vision encoder. Source: Qwen2_5_VisionTransformerPretrainedModel of transformers, whose names it has.

Shapes: P patches, F features, R and K rows and columns of features, W features along the side of a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.vision.native_config import NativeConfig
from vlserve.vision.native_tower import Block, Grid, NativeTower, Stretches, joined, whole_units
from vlserve.vision.qwen2_vl import Merger
from vlserve.vision.qwen_config import QwenVisionConfig


class Qwen2_5VLTower(NativeTower):
    """Layers with RMSNorm and SwiGLU; most of them see windows of a picture, whose patches stand together."""

    def __init__(self, config: QwenVisionConfig, image: NativeConfig) -> None:
        super().__init__(config, image)
        width, inner = config.width, config.intermediate_size
        self.blocks = nn.ModuleList(Block(config, nn.RMSNorm, GatedMLP(width, inner)) for _ in range(config.depth))
        self.merger = Merger(config, nn.RMSNorm)

    def features(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        merge = self.image.merge_size
        order, windows = order_by_windows([(r // merge, c // merge) for r, c in grids], self.config.window, x.device)
        windows = [(number, length * merge**2) for number, length in windows]
        cos_sin = self.cos_sin(_by_feature(self.rows_and_columns(grids, x.device), order, merge))
        whole = whole_units(grids)
        x = _by_feature(x, order, merge)
        for number, block in enumerate(self.blocks):
            x = block(x, cos_sin, whole if number in self.config.full_layers else windows)
        found = self.merger(x)
        return torch.empty_like(found).index_copy_(0, order, found).unsqueeze(1)


class GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


def order_by_windows(grids: Sequence[Grid], window: int, device: torch.device) -> tuple[torch.Tensor, Stretches]:
    """Features [F] int64 by windows, and how many windows of which sizes there are: within a picture the whole ones first, then
    those that its right edge cuts, its lower edge, and both."""
    orders: list[torch.Tensor] = []
    sizes: Stretches = []
    first = 0
    for rows, columns in grids:
        places = torch.arange(first, first + rows * columns, device=device).view(rows, columns)
        first += rows * columns
        below, beyond = rows // window * window, columns // window * window
        for part, height in ((places[:below], window), (places[below:], rows - below)):
            for side, width in ((part[:, :beyond], window), (part[:, beyond:], columns - beyond)):
                if side.numel():
                    orders.append(_cut(side, height, width).flatten())
                    sizes.append((side.numel() // (height * width), height * width))
    return torch.cat(orders), joined(iter(sizes))


def _cut(side: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[R, K] -> [R / height, K / width, height, width]."""
    return side.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2)


def _by_feature(x: torch.Tensor, order: torch.Tensor, merge: int) -> torch.Tensor:
    """Patches [P, ...] in another order of their features."""
    return x.unflatten(0, (-1, merge**2)).index_select(0, order).flatten(0, 1)
