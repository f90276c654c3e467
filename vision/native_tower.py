"""Encoders whose units are pictures of any size, or pairs of frames: the patches of several units, one after another.

No unit sees another's patches. Attention is torch's, a call for all stretches of one length, which the host knows: nothing waits
for the device. Shapes: P patches, H heads, D head_dim, C width, F features, L levels, O the decoder's hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from vlserve.vision.native_config import NativeConfig
from vlserve.vision.native_pixels import patchify
from vlserve.vision.pixels import Unit
from vlserve.vision.preprocess import Normaliser
from vlserve.vision.qwen_config import QwenVisionConfig
from vlserve.vision.tower import Tower

Grid = tuple[int, int]  # rows and columns of patches
Stretches = list[tuple[int, int]]  # (how many, patches in each), one after another, that see what is in them
CosSin = tuple[torch.Tensor, torch.Tensor]  # [P, 1, D/2] float32 each


class NativeTower(Tower):
    """A family has its own `blocks`, and `features`, which go through them."""

    blocks: nn.ModuleList

    def __init__(self, config: QwenVisionConfig, image: NativeConfig) -> None:
        super().__init__()
        self.config, self.image = config, image
        self.normalise = Normaliser(image)
        self.patch_embed = PatchEmbed(config, bias=config.position_side > 0)

    @abstractmethod
    def features(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embedded patches [P, C] of units with these grids -> features [F, L, O]."""

    def encode(self, pixels: torch.Tensor, units: Sequence[Unit]) -> torch.Tensor:
        numbers = iter(pixels.split([unit.num_bytes for unit in units]))
        found: torch.Tensor | None = None
        place = 0
        for pack in self._packs(units):
            some = self._encode([(next(numbers), unit) for unit in pack])
            if len(pack) == len(units):
                return some
            if found is None:  # put into one tensor at once: all parts beside it would take the memory twice
                found = some.new_empty(sum(unit.num_features for unit in units), *some.shape[1:])
            found[place : place + len(some)] = some
            place += len(some)
        assert found is not None
        return found

    def _encode(self, pack: Sequence[tuple[torch.Tensor, Unit]]) -> torch.Tensor:
        patches = [self._patches(*one) for one in pack]
        grids = [self._grid(unit) for _, unit in pack]
        return self.features(self.patch_embed(patches.pop() if len(patches) == 1 else torch.cat(patches)), grids)

    def _patches(self, numbers: torch.Tensor, unit: Unit) -> torch.Tensor:
        weight = self.patch_embed.proj.weight
        frames = numbers.view(-1, *unit.shape[-3:]).to(weight.device, non_blocking=True)
        return patchify(self.normalise(frames).to(weight.dtype), self.image)

    def _packs(self, units: Sequence[Unit]) -> Iterator[list[Unit]]:
        """Neighbours, as many as have no more patches than the largest picture."""
        most = sum(unit.num_features for unit in self.heaviest())
        pack: list[Unit] = []
        for unit in units:
            if pack and sum(one.num_features for one in pack) + unit.num_features > most:
                yield pack
                pack = []
            pack.append(unit)
        if pack:
            yield pack

    def smallest(self) -> Unit:
        return self.image.unit(self.image.factor, self.image.factor)

    def heaviest(self) -> list[Unit]:
        """A square one of the most pixels."""
        side = max(1, int(self.image.max_pixels**0.5) // self.image.factor) * self.image.factor
        return [self.image.unit(side, side)]

    def cost(self, unit: Unit) -> float:
        """Multiplications, by the width: with the weights for each patch, and in attention over all of them."""
        return unit.num_features * (self._linear_cost + self._full_share * 2 * unit.num_features * self.image.merge_size**2)

    @cached_property
    def _linear_cost(self) -> float:
        return sum(parameter.numel() for parameter in self.blocks.parameters()) / len(self.blocks) / self.config.width

    @property
    def _full_share(self) -> float:
        """Of layers that see all of a picture."""
        return len(self.config.full_layers) / self.config.depth if self.config.window else 1.0

    def targets(self) -> dict[str, torch.Tensor]:
        return {f"visual.{name}": parameter.data for name, parameter in self.named_parameters()}

    def _grid(self, unit: Unit) -> Grid:
        height, width = unit.shape[-2:]
        return height // self.image.patch_size, width // self.image.patch_size

    def rows_and_columns(self, grids: Sequence[Grid], device: torch.device) -> torch.Tensor:
        """[P, 2] int64, where the patches of a feature stand together."""
        return torch.cat([_rows_and_columns(*grid, self.image.merge_size, device) for grid in grids])

    def cos_sin(self, rows_and_columns: torch.Tensor) -> CosSin:
        """Half of a head's frequencies turn by row, half by column. Source: Qwen2VLVisionRotaryEmbedding of transformers."""
        dim = self.config.width // self.config.num_heads // 2
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=rows_and_columns.device) / dim
        frequencies = 1.0 / self.config.rope_theta**exponents  # [D/4]
        angles = (rows_and_columns[..., None].float() * frequencies).flatten(1).unsqueeze(1)  # [P, 1, D/2]
        return angles.cos(), angles.sin()


def whole_units(grids: Sequence[Grid]) -> Stretches:
    """Each unit sees itself; neighbours of one size are computed together."""
    return joined((1, rows * columns) for rows, columns in grids)


def joined(stretches: Iterator[tuple[int, int]]) -> Stretches:
    found: Stretches = []
    for number, length in stretches:
        if found and found[-1][1] == length:
            found[-1] = (found[-1][0] + number, length)
        else:
            found.append((number, length))
    return found


class PatchEmbed(nn.Module):
    """A convolution whose steps are as long as its kernel, as the product that it is."""

    def __init__(self, config: QwenVisionConfig, *, bias: bool) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.width, kernel, stride=kernel, bias=bias)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[P, 3 * T * S * S] -> [P, C]."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: QwenVisionConfig, norm: type[nn.LayerNorm | nn.RMSNorm], mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(config.width, eps=1e-6), norm(config.width, eps=1e-6)
        self.attn, self.mlp = PackedAttention(config.width, config.num_heads), mlp

    def forward(self, x: torch.Tensor, cos_sin: CosSin, stretches: Stretches) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), cos_sin, stretches)
        return x + self.mlp(self.norm2(x))


class PackedAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, cos_sin: CosSin, stretches: Stretches) -> torch.Tensor:
        """x [P, C] -> [P, C]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        return self.proj(attend(turned(query, *cos_sin), turned(key, *cos_sin), value, stretches))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stretches: Stretches) -> torch.Tensor:
    """[P, H, D] -> [P, H * D]; each stretch by itself."""
    found = []
    sizes = [number * length for number, length in stretches]
    for (_, length), *parts in zip(stretches, *(part.split(sizes) for part in (query, key, value)), strict=True):
        heads = [part.unflatten(0, (-1, length)).transpose(1, 2) for part in parts]  # [stretches, H, length, D]
        found.append(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1).flatten(1))
    return found[0] if len(found) == 1 else torch.cat(found)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [P, H, D] by pairs of channels (i, i + D/2), in float32."""
    out, (first, second) = torch.empty_like(x), x.float().chunk(2, -1)
    below, above = out.chunk(2, -1)
    below.copy_(torch.addcmul(first * cos, second, sin, value=-1))
    above.copy_(torch.addcmul(second * cos, first, sin))
    return out


def _rows_and_columns(rows: int, columns: int, merge: int, device: torch.device) -> torch.Tensor:
    places = torch.stack(
        torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"), -1
    )
    return places.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2).reshape(-1, 2)
