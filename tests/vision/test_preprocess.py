"""Tiles equal transformers' InternVL processor to the last bit, for every size and mode that our media step yields."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlserve.media.decode import decode_image
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.tiles import TilePreprocessor
from vlserve.vision.image_config import ImageConfig
from vlserve.vision.preprocess import make_tiles, normalise
from vlserve.vision.tiling import Grid, choose_grid

SIZES = [
    *((1, 1), (1, 5000), (5000, 1), (448, 448), (4000, 3000), (28, 28), (27, 29), (56, 28), (57, 28), (300, 17)),
    *((640, 480), (3, 2), (1920, 1080), (100, 100), (84, 56), (1000, 999)),
]


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_pictures() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    deep = Image.fromarray((np.random.default_rng(1).integers(0, 65536, (40, 60))).astype(np.uint16))
    return {
        "palette": encoded(Image.fromarray(noise(90, 50)).quantize(16), "PNG"),
        "grey": encoded(Image.fromarray(noise(90, 50, 1)), "PNG"),
        "rgba": encoded(Image.fromarray(noise(90, 50, 4)), "PNG"),
        "sixteen bit": encoded(deep, "PNG"),
        "exif": encoded(Image.fromarray(noise(90, 50)), "JPEG", exif=exif),
        "bilevel": encoded(Image.fromarray(noise(90, 50, 1)).convert("1"), "PNG"),
        "cmyk": encoded(Image.fromarray(noise(90, 50)).convert("CMYK"), "JPEG"),
    }


def image_config(folder: Path) -> ImageConfig:
    preprocessor = read_checkpoint(folder).preprocessor
    assert isinstance(preprocessor, TilePreprocessor)
    return preprocessor.image


def largest_difference(image: Image.Image, folder: Path, config: ImageConfig) -> float:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    want = processor.image_processor(image, crop_to_patches=True, return_tensors="pt")
    tiles = make_tiles(image, config)
    pixels = torch.from_numpy(tiles.data).view(-1, *config.unit.shape)
    got = normalise(pixels, torch.tensor(config.mean), torch.tensor(config.std))
    assert got.shape == want["pixel_values"].shape
    assert tiles.num_features == int(want["num_patches"][0]) * config.tokens_per_tile
    return float((got - want["pixel_values"]).abs().max())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_equal_transformers(size: tuple[int, int], checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    assert largest_difference(Image.fromarray(noise(*size)), folder, image_config(folder)) == 0


@pytest.mark.parametrize("kind", odd_pictures())
def test_tiles_of_odd_pictures_equal_transformers(kind: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()
    image = decode_image(odd_pictures()[kind], param="image")
    assert image.mode == "RGB"
    assert largest_difference(image, folder, image_config(folder)) == 0


def test_grids_equal_transformers() -> None:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width, tile = (int(n) for n in rng.integers(1, 900, 3))
        low = int(rng.integers(1, 4))
        high = low + int(rng.integers(0, 12))
        got = choose_grid(height, width, tile_size=tile, min_patches=low, max_patches=high)
        assert (got.columns, got.rows) == get_optimal_tiled_canvas((height, width), (tile, tile), low, high)


def test_a_single_tile_has_no_thumbnail() -> None:
    assert Grid(1, 1).num_tiles == 1 and Grid(2, 1).num_tiles == 3


def test_the_digest_covers_pixels_size_and_settings() -> None:
    config = ImageConfig(tile_size=28, tokens_per_tile=4)
    picture = noise(20, 10)
    one_off = picture.copy()
    one_off[3, 4, 1] ^= 1
    other_settings = ImageConfig(tile_size=28, tokens_per_tile=4, max_patches=2)
    digests = [
        make_tiles(Image.fromarray(picture), config).digest,
        make_tiles(Image.fromarray(one_off), config).digest,
        make_tiles(Image.fromarray(picture.reshape(20, 10, 3)), config).digest,
        make_tiles(Image.fromarray(picture), other_settings).digest,
    ]
    assert len(set(digests)) == 4 and all(len(d) == 32 for d in digests)
    assert digests[0] == make_tiles(Image.fromarray(picture), config).digest
