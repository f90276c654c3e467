"""Pictures of any size: pixels, grids and numbers of tokens are those of transformers' Qwen2VLImageProcessor."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vision.test_preprocess import noise
from vlserve.errors import RequestError
from vlserve.models.architecture import Architecture
from vlserve.models.qwen2_5_vl import QWEN2_5_VL
from vlserve.models.qwen2_vl import QWEN2_VL
from vlserve.models.qwen3_vl import QWEN3_VL
from vlserve.models.qwen_vl import QwenPreprocessor
from vlserve.vision.native_pixels import patchify
from vlserve.vision.pixels import Unit
from vlserve.vision.preprocess import Normaliser

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
OF_14, OF_16 = ({"patch_size": side, "temporal_patch_size": 2, "merge_size": 2} for side in (14, 16))
PUBLISHED: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "Qwen2-VL": (
        QWEN2_VL,
        {"min_pixels": 3136, "max_pixels": 12845056, **OF_14, **CLIP, "image_processor_type": "Qwen2VLImageProcessor"},
    ),
    "Qwen2.5-VL": (
        QWEN2_5_VL,
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            **OF_14,
            **CLIP,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    ),
    "Qwen3-VL": (
        QWEN3_VL,
        {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            **OF_16,
            **HALF,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
        },
    ),
    "Qwen3-VL-Embedding": (  # saved with nulls, and the limits in two places
        QWEN3_VL,
        {
            "crop_size": None,
            "data_format": "channels_first",
            "default_to_square": True,
            "do_center_crop": None,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": None,
            "do_rescale": True,
            "do_resize": True,
            "min_pixels": 4096,
            "max_pixels": 1310720,
            "size": {"longest_edge": 1310720, "shortest_edge": 4096},
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **OF_16,
            **HALF,
        },
    ),
    "saved by transformers 4.49": (
        QWEN2_VL,
        {"size": {"min_pixels": 3136, "max_pixels": 200704}, "min_pixels": 3136, "max_pixels": 200704, **OF_14, **CLIP},
    ),
}
EDGES = [(1, 1), (1, 200), (200, 1), (28, 28), (27, 29), (14, 14), (42, 14), (13, 2600), (5600, 28), (3, 2), (640, 480)]
EDGES += [(1920, 1080), (1000, 999), (32, 32), (31, 33), (448, 449), (100, 20), (16, 2000), (1250, 650), (2000, 1500)]


def sizes(seed: int, number: int = 40) -> list[tuple[int, int]]:
    rng, found = random.Random(seed), list(EDGES)
    while len(found) < len(EDGES) + number:
        size = int(2 ** rng.uniform(0, 10)), int(2 ** rng.uniform(0, 10))
        if max(size) <= 200 * min(size):
            found.append(size)
    return found


def read(name: str) -> QwenPreprocessor:
    family, settings = PUBLISHED[name]
    found = family.preprocessor({"vision_config": {}}, {"preprocessor_config.json": settings})
    assert isinstance(found, QwenPreprocessor)
    return found


def patches(preprocessor: QwenPreprocessor, image: Image.Image) -> tuple[torch.Tensor, list[int]]:
    """As a rank makes them, and the grid."""
    pixels, config = preprocessor.prepare(image, "auto"), preprocessor.image
    (unit,) = pixels.units
    frames = torch.from_numpy(pixels.data).view(1, *unit.shape)
    grid = [1, *(side // config.patch_size for side in unit.shape[1:])]
    assert unit.num_features == preprocessor.count_features(*image.size, "auto") == np.prod(grid) // 4
    assert unit.num_features <= preprocessor.most_features()
    return patchify(Normaliser(config)(frames), config), grid


@pytest.mark.parametrize("name", PUBLISHED)
def test_pixels_and_grids_are_transformers(name: str) -> None:
    from transformers import Qwen2VLImageProcessor

    preprocessor, reference = read(name), Qwen2VLImageProcessor(**PUBLISHED[name][1])
    largest = 0.0
    some = sizes(len(name)) if name in ("Qwen2-VL", "Qwen3-VL") else sizes(len(name), 10)[:18]
    for number, size in enumerate(some):
        image = Image.fromarray(noise(*size, seed=number))
        want = reference(images=[image], return_tensors="pt")
        got, grid = patches(preprocessor, image)
        assert grid == want["image_grid_thw"][0].tolist(), size
        largest = max(largest, float((got - want["pixel_values"]).abs().max()))
    print(f"{name}: {len(some)} sizes, largest difference {largest}")
    assert largest == 0


@pytest.mark.parametrize("options", ({"min_pixels": 50000}, {"max_pixels": 90000}, {"min_pixels": 4000, "max_pixels": 9000}))
def test_bounds_of_a_request_are_transformers(options: dict[str, int]) -> None:
    from transformers import Qwen2VLImageProcessor

    own = read("Qwen2-VL").configured(options)
    nested = read("Qwen2-VL").configured({"images_kwargs": options})
    names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    assert own == nested == read("Qwen2-VL").configured({"size": {names[key]: value for key, value in options.items()}})
    reference = Qwen2VLImageProcessor(**PUBLISHED["Qwen2-VL"][1] | options)
    for width, height in sizes(3):
        want = reference.get_number_of_image_patches(height, width) // 4
        assert own.count_features(width, height, "auto") == want <= own.most_features()


def test_64_megapixels_are_resized() -> None:
    preprocessor = read("Qwen2.5-VL")
    image = Image.new("RGB", (8000, 8000), (9, 9, 9))
    assert preprocessor.prepare(image, "high").units == (Unit((3, 3584, 3584), 16384),)
    assert preprocessor.most_features() == 16384


def test_a_picture_that_is_too_narrow_is_refused() -> None:
    for size in ((201, 1), (1, 201), (2001, 10)):
        with pytest.raises(RequestError, match=rf"{size[0]}x{size[1]} pixels; its sides may be up to 200:1"):
            read("Qwen3-VL").count_features(*size, "low")
        with pytest.raises(RequestError, match="200:1"):
            read("Qwen3-VL").prepare(Image.new("RGB", size), "auto")


def test_detail() -> None:
    """`low` is at most 512 x 512 pixels; the others are the model's own bounds."""
    preprocessor = read("Qwen2.5-VL")
    assert preprocessor.count_features(2000, 1500, "auto") == preprocessor.count_features(2000, 1500, "high") == 71 * 54
    assert preprocessor.count_features(2000, 1500, "low") == 21 * 15 and 21 * 15 * 28**2 <= 512**2
    assert preprocessor.count_features(100, 100, "low") == preprocessor.count_features(100, 100, "high")
    picture = Image.fromarray(noise(900, 700))
    low, high = (preprocessor.prepare(picture, detail) for detail in ("low", "high"))
    assert low.num_features == preprocessor.count_features(900, 700, "low") < high.num_features and low.digest != high.digest


def test_a_size_of_its_own() -> None:
    """As qwen-vl-utils has it: rounded to whole features, within the bounds."""
    own = read("Qwen2.5-VL").configured({"resized_height": 280, "resized_width": 420})
    assert own.prepare(Image.fromarray(noise(100, 30)), "auto").units == (Unit((3, 280, 420), 150),)
    assert own.count_features(5, 5, "auto") == 150


@pytest.mark.parametrize(
    "options,message",
    (
        ({"max_dynamic_patch": 4}, "mm_processor_kwargs.max_dynamic_patch is not supported by this model"),
        ({"size": {"height": 4}}, "mm_processor_kwargs.size.height is not supported by this model"),
        ({"max_pixels": 0}, "mm_processor_kwargs.max_pixels is 0; expected a whole number of 1 or more"),
        ({"images_kwargs": {"min_pixels": True}}, "mm_processor_kwargs.images_kwargs.min_pixels is True; expected"),
        ({"max_pixels": 12845057}, "mm_processor_kwargs.max_pixels is 12845057; the model's own limit is 12845056 pixels"),
        (
            {"min_pixels": 9000, "max_pixels": 8000},
            "mm_processor_kwargs.min_pixels: min_pixels 9000 is more than max_pixels 8000",
        ),
        ({"resized_height": 280}, "mm_processor_kwargs.resized_height needs the other one"),
        ({"resized_height": 1, "resized_width": 201}, "mm_processor_kwargs.resized_height: the picture has 201x1 pixels"),
    ),
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        read("Qwen2-VL").configured(options)
    assert str(error.value).startswith(message) and (error.value.param or "") in message


def test_a_pictures_options_count_within_the_models_own() -> None:
    request = read("Qwen2-VL").configured({"max_pixels": 4096})
    assert isinstance(request, QwenPreprocessor)
    assert request.image.max_pixels == 4096 and request.image.min_pixels == 3136
    own = request.configured({"max_pixels": 100000})
    assert own.count_features(3000, 3000, "auto") > request.count_features(3000, 3000, "auto")
    assert request.configured({"max_pixels": None}) == request
    small = read("Qwen2-VL").configured({"max_pixels": 800})  # below the checkpoint's least, which gives way
    assert small.count_features(500, 500, "auto") == 1


@pytest.mark.parametrize(
    "changed,message",
    (
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type 'CLIPImageProcessor' is not supported"),
        ({"patch_size": 16}, "the image processor's patch_size is 16, and the vision encoder has 14"),
        ({"merge_size": 1}, "the image processor's merge_size is 1, and the vision encoder has 2"),
        ({"do_resize": False}, "do_resize False is not supported"),
        ({"resample": 1}, "resample 1 is not supported"),
        ({"max_pixels": "many"}, "max_pixels .* is 'many'; expected"),
        ({"min_pixels": 10**9}, "min_pixels .* is 1000000000; expected"),
        ({"size": 448, "min_pixels": None}, "size is 448; expected an object"),
        ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels 5000 is more than its max_pixels 4000"),
    ),
)
def test_settings_that_cannot_be_followed_are_named(changed: dict[str, Any], message: str) -> None:
    settings = PUBLISHED["Qwen2-VL"][1] | changed
    with pytest.raises(ValueError, match=message):
        QWEN2_VL.preprocessor({"vision_config": {}}, {"preprocessor_config.json": settings})


def test_equal_pictures_have_equal_digests() -> None:
    preprocessor, image = read("Qwen3-VL"), Image.fromarray(noise(90, 70))
    digests = [preprocessor.prepare(image, "auto").digest for _ in range(2)]
    assert digests[0] == digests[1]
    other = replace(preprocessor, image=replace(preprocessor.image, min_pixels=1)).prepare(image, "auto").digest
    turned = preprocessor.prepare(image.transpose(Image.Transpose.ROTATE_90), "auto").digest
    assert len({digests[0], other, turned}) == 3
