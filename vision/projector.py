"""From the encoder's patches to the language model's tokens: pixel shuffle and a two-layer MLP.

Source: InternVL 1.5 (arXiv 2404.16821). Shapes: N tiles, P = h * h patches, C encoder width, r how many
patches along a side become one token, K = P / r^2 tokens a tile, H hidden size of the language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.vision.config import EncoderConfig


def pixel_shuffle(x: torch.Tensor, ratio: int, *, transposed: bool = False) -> torch.Tensor:
    """x [N, P, C] -> [N, K, r*r*C]: the r x r patches of a square become one token's channels.

    `transposed`: tokens go down the columns, as in ps_version v1 of OpenGVLab's format.
    """
    side = int(x.shape[1] ** 0.5)
    x = x.unflatten(1, (side // ratio, ratio, side // ratio, ratio))  # [N, rows, i, columns, j, C]
    x = x.permute(0, 3, 1, 2, 4, 5) if transposed else x.permute(0, 1, 3, 2, 4, 5)
    return x.flatten(3).flatten(1, 2)


class Projector(nn.Module):
    def __init__(self, config: EncoderConfig, out_size: int) -> None:
        super().__init__()
        self.ratio, self.transposed = round(1 / config.downsample_ratio), config.transposed_tokens
        width = config.hidden_size * self.ratio**2
        self.layer_norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, out_size)
        self.linear_2 = nn.Linear(out_size, out_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """patches [N, P, C] (no class token) -> [N, K, H]."""
        x = self.layer_norm(pixel_shuffle(patches, self.ratio, transposed=self.transposed))
        return self.linear_2(F.gelu(self.linear_1(x)))
