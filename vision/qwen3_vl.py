"""Qwen3-VL's vision encoder. Source: Qwen3VLVisionModel of transformers, by whose names its parameters go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.vision.native_config import NativeConfig
from vlserve.vision.native_tower import Block, Grid, NativeTower, whole_units
from vlserve.vision.qwen_config import QwenVisionConfig


class Qwen3VLTower(NativeTower):
    """Learned positions, laid over each picture; layers that see all of it; features also of layers between (DeepStack)."""

    def __init__(self, config: QwenVisionConfig, image: NativeConfig) -> None:
        super().__init__(config, image)
        self.pos_embed = nn.Embedding(config.position_side**2, config.width)
        width, inner = config.width, config.intermediate_size
        self.blocks = nn.ModuleList(Block(config, nn.LayerNorm, TanhMLP(width, inner)) for _ in range(config.depth))
        self.merger = Merger(config, is_deep=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(config, is_deep=True) for _ in config.deep_layers)

    @property
    def levels(self) -> int:
        return 1 + len(self.config.deep_layers)

    def features(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        rows_and_columns = self.rows_and_columns(grids, x.device)
        x = x + self._positions(rows_and_columns, grids).to(x.dtype)
        cos_sin, whole = self.cos_sin(rows_and_columns), whole_units(grids)
        deep: list[torch.Tensor] = []
        for number, block in enumerate(self.blocks):
            x = block(x, cos_sin, whole)
            if number in self.config.deep_layers:
                deep.append(self.deepstack_merger_list[len(deep)](x))
        return torch.stack((self.merger(x), *deep), 1)

    def _positions(self, rows_and_columns: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """[P, C] float32: bilinear between the learned positions around where a patch falls; a picture's corners are theirs."""
        side, device = self.config.position_side, rows_and_columns.device
        steps = torch.cat([_steps(grid, side, device) for grid in grids])  # [P, 2]
        places = rows_and_columns.float() * (side - 1) / steps
        low = places.floor()
        part, before = places - low, low.long()
        after = (before + 1).clamp_max(side - 1)
        found: torch.Tensor | None = None
        for row, down in ((before[:, 0], 1 - part[:, 0]), (after[:, 0], part[:, 0])):
            for column, across in ((before[:, 1], 1 - part[:, 1]), (after[:, 1], part[:, 1])):
                some = self.pos_embed(row * side + column) * (down * across).unsqueeze(1)
                found = some if found is None else found.add_(some)
        assert found is not None
        return found


class TanhMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Merger(nn.Module):
    """The patches of a feature side by side, through two layers: [P, C] -> [F, O]. The norm of a deep one is of them together."""

    def __init__(self, config: QwenVisionConfig, *, is_deep: bool) -> None:
        super().__init__()
        self.inner = config.width * config.spatial_merge_size**2
        self.norm = nn.LayerNorm(self.inner if is_deep else config.width, eps=1e-6)
        self.linear_fc1, self.linear_fc2 = nn.Linear(self.inner, self.inner), nn.Linear(self.inner, config.out_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x.view(-1, *self.norm.normalized_shape)).view(-1, self.inner)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


def _steps(grid: Grid, side: int, device: torch.device) -> torch.Tensor:
    """[P, 2] float32: steps from a picture's first row and column to its last."""
    rows, columns = grid
    down = torch.full((rows * columns, 1), max(rows - 1, 1), dtype=torch.float32, device=device)
    across = torch.full((rows * columns, 1), max(columns - 1, 1), dtype=torch.float32, device=device)
    return torch.cat((down, across), 1)
