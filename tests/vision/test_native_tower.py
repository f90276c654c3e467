"""The encoders of Qwen-VL give transformers' features, all levels of them, and those of a picture in any company."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.qwen_vl import KINDS, make_qwen_vl
from tests.vision.test_preprocess import noise
from vlserve.llm.tensor_parallel import Split
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.qwen_vl import QwenPreprocessor
from vlserve.vision.native_tower import NativeTower
from vlserve.vision.pixels import Pixels
from vlserve.vision.qwen2_5_vl import order_by_windows


def load(folder: Path) -> tuple[QwenPreprocessor, NativeTower]:
    checkpoint = read_checkpoint(folder)
    with torch.device("meta"):
        model = checkpoint.architecture.build(checkpoint.config, checkpoint.preprocessor, Split())
    model.to_empty(device="cpu").eval().requires_grad_(False)
    model.load(folder, lambda done, total: None)
    assert isinstance(checkpoint.preprocessor, QwenPreprocessor) and isinstance(model.tower, NativeTower)
    return checkpoint.preprocessor, model.tower


def encode(tower: NativeTower, pictures: list[Pixels]) -> torch.Tensor:
    units = [unit for pixels in pictures for unit in pixels.units]
    return tower.encode(torch.cat([torch.from_numpy(pixels.data) for pixels in pictures]), units)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_features_are_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = make_qwen_vl(tmp_path, kind, most_features=100)
    preprocessor, tower = load(folder)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().model.visual
    sizes = [(1, 1), (5600, 28), (28, 4000), (30, 31), (290, 300), (290, 300), (140, 400), (900, 200), (2000, 2000)]
    images = [Image.fromarray(noise(*size, seed=number)) for number, size in enumerate(sizes)]
    pictures = [preprocessor.prepare(image, "auto") for image in images]
    given = AutoProcessor.from_pretrained(folder).image_processor(images=images, return_tensors="pt")
    out = theirs(given["pixel_values"], grid_thw=given["image_grid_thw"])
    want = torch.stack((out.pooler_output, *getattr(out, "deepstack_features", ())), 1)
    together = encode(tower, pictures)
    alone = torch.cat([encode(tower, [pixels]) for pixels in pictures])
    difference = max(float((got - want).abs().max()) for got in (together, alone))
    print(f"{kind}: {tuple(want.shape)}, largest difference {difference:.1e}, of numbers up to {float(want.abs().max()):.1f}")
    assert together.shape == want.shape and difference < 2e-5
    assert tower.levels == want.shape[1]


def test_no_more_at_once_than_the_largest_picture(tmp_path: Path) -> None:
    preprocessor, tower = load(make_qwen_vl(tmp_path, "qwen2_vl", most_features=16))
    units = [
        preprocessor.image.unit(28 * rows, 28 * columns) for rows, columns in ((1, 3), (4, 4), (2, 2), (3, 4), (1, 1), (1, 20))
    ]
    assert [[unit.num_features for unit in pack] for pack in tower._packs(units)] == [[3], [16], [4, 12], [1], [20]]
    assert tower.cost(units[1]) > 16 / 3 * tower.cost(units[0]), "attention grows with the square"
    narrow = replace(preprocessor.image, max_pixels=100)
    tower.image = narrow
    assert tower.heaviest() == [tower.smallest()]


@pytest.mark.parametrize("window", (1, 2, 4))
def test_windows_are_transformers(window: int) -> None:
    from transformers.vision_utils import get_vision_window_index

    rng = random.Random(window)
    grids = [(rng.randint(1, 13), rng.randint(1, 13)) for _ in range(30)]
    index, edges = get_vision_window_index(torch.tensor([(1, 2 * r, 2 * c) for r, c in grids]), 2, 28 * window, 14)
    want = {frozenset(part.tolist()) for part in index.split([n // 4 for n in edges.diff().tolist()])}
    order, stretches = order_by_windows(grids, window, torch.device("cpu"))
    got = order.split([length for number, length in stretches for _ in range(number)])
    assert {frozenset(part.tolist()) for part in got} == want and len(order) == len(index) == len(set(order.tolist()))
