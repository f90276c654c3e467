"""From an RGB picture to uint8 tiles and their digest.

Tiles stay uint8 until they are on the device that encodes them (a quarter of the bytes);
`normalise` turns them into the encoder's float input there. Shapes: N tiles, S tile size in pixels,
H and W the picture's.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from vlserve.kernels.upload import upload
from vlserve.vision.pixels import Pixels

if TYPE_CHECKING:
    from PIL import Image

    from vlserve.vision.image_config import ImageConfig
    from vlserve.vision.native_config import NativeConfig


def make_tiles(image: Image.Image, config: ImageConfig) -> Pixels:
    """Cut an RGB picture into tiles, the thumbnail last.

    Args:
        image: a PIL picture in mode RGB, any size from 1x1.
        config: tile size, tile bounds and tokens per tile.
    """
    array = np.array(image)  # [H, W, 3], a copy: torch wants writable memory
    digest = image_digest(array, config)
    picture = torch.from_numpy(array).permute(2, 0, 1)  # [3, H, W], channels last in memory, as the resize likes it
    size, grid = config.tile_size, config.grid(image.height, image.width)
    if config.pad_to_square and not config.dynamic:
        picture = _padded(picture, config.mean)
    to_size = _resize_as_pillow if config.resize == "pillow" else partial(resize, mode=config.resample)
    canvas = to_size(picture, grid.rows * size, grid.columns * size)
    tiles = canvas.unflatten(1, (grid.rows, size)).unflatten(3, (grid.columns, size))  # [3, R, S, C, S]
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)  # [R*C, 3, S, S]
    if config.thumbnail and grid.cells > 1:
        tiles = torch.cat([tiles, to_size(picture, size, size)[None]])
    return Pixels(
        data=tiles.contiguous().view(-1).numpy(),
        units=(config.unit,) * len(tiles),
        digest=digest,
    )


def normalise(
    pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, *, rescale_factor: float = 1 / 255, do_normalize: bool = True
) -> torch.Tensor:
    """uint8 tiles [N, 3, S, S] to float32, by channel means and deviations of pixels times `rescale_factor`.

    Written as transformers does it (one fused subtraction and division, scaled by 255), so that
    the result is the same to the last bit.
    """
    if not do_normalize:
        return pixels.float() * rescale_factor
    shape, scale = (1, 3, 1, 1), 1.0 / rescale_factor
    return (pixels.float() - (mean * scale).view(shape)) / (std * scale).view(shape)


class Normaliser:
    """`normalise` with a config's numbers, which go to the device with the first pixels."""

    def __init__(self, config: ImageConfig | NativeConfig) -> None:
        self._config = config
        self._mean_std: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] on the device to float32."""
        config = self._config
        if self._mean_std is None:
            self._mean_std = upload(config.mean, torch.float32, pixels.device), upload(config.std, torch.float32, pixels.device)
        mean, std = self._mean_std
        return normalise(pixels, mean, std, rescale_factor=config.rescale_factor, do_normalize=config.do_normalize)


def image_digest(array: np.ndarray, config: ImageConfig | NativeConfig) -> bytes:
    """32 bytes over size, pixels and every setting that changes the tiles."""
    header = repr(("RGB", array.shape, str(array.dtype), config)).encode()
    digest = hashlib.blake2b(header, digest_size=32)
    digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def resize(picture: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """On uint8, [3, H, W] -> [3, height, width], antialiased where the mode can be; equals torchvision's to the bit."""
    if picture.shape[1:] == (height, width):
        return picture
    return F.interpolate(picture[None], size=(height, width), mode=mode, antialias=mode != "nearest-exact")[0]


def _resize_as_pillow(picture: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """As `Image.resize` does by default, bicubic: [3, H, W] -> [3, height, width]."""
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _padded(picture: torch.Tensor, mean: tuple[float, ...]) -> torch.Tensor:
    """[3, H, W] in the middle of a square of the mean colour."""
    _, height, width = picture.shape
    side = max(height, width)
    square = torch.tensor([int(part * 255) for part in mean], dtype=torch.uint8).view(3, 1, 1).expand(3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = picture
    return square
