"""Pictures of any size: from an RGB picture to a resized one, and from there to patches.

Numbers stay uint8 until they are on the device that encodes them. Shapes: H and W a resized picture's pixels, T frames in a
patch, S a patch's side, M patches along the side of a feature, P patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vlserve.vision.pixels import Pixels
from vlserve.vision.preprocess import image_digest, resize

if TYPE_CHECKING:
    from PIL import Image

    from vlserve.vision.native_config import NativeConfig


def resize_picture(image: Image.Image, config: NativeConfig) -> Pixels:
    """An RGB picture as one unit [3, H, W]; raises ValueError where it is too narrow."""
    array = np.array(image)  # [height, width, 3], a copy: torch wants writable memory
    height, width = config.size_of(image.height, image.width)
    digest = image_digest(array, config)
    picture = resize(torch.from_numpy(array).permute(2, 0, 1), height, width, config.resample)
    return Pixels(data=picture.contiguous().view(-1).numpy(), units=(config.unit(height, width),), digest=digest)


def patchify(frames: torch.Tensor, config: NativeConfig) -> torch.Tensor:
    """frames [T, 3, H, W], or [1, 3, H, W] for T times the same -> [P, 3 * T * S * S]; the M * M patches of a feature stand
    together. Source: Qwen2VLImageProcessor."""
    patch, merge = config.patch_size, config.merge_size
    frames = frames.expand(config.temporal_patch_size, -1, -1, -1)
    cut = frames.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))  # [T, 3, H/MS, M, S, W/MS, M, S]
    return cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, 3 * config.temporal_patch_size * patch**2)
