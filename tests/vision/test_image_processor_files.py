"""Image processors' files in the shapes that are published: pixels and tokens are those of transformers' AutoProcessor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.checkpoints import TILE
from tests.vision.test_preprocess import noise
from vlserve.errors import ModelError, RequestError
from vlserve.models.checkpoint import read_checkpoint
from vlserve.models.tiles import TilePreprocessor
from vlserve.vision.image_config import ImageConfig
from vlserve.vision.preprocess import make_tiles
from vlserve.vision.tower import TileTower

# as transformers' conversion script writes the "-hf" editions: nulls, crop_to_patches false, and a class with "Fast"
PUBLISHED: dict[str, Any] = {
    "crop_size": None,
    "crop_to_patches": False,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"height": TILE, "width": TILE},
}
PROCESSOR = {"image_seq_length": 4, "processor_class": "InternVLProcessor"}
# with further keys, as in an older revision
OLDER = {**PROCESSOR, "context_image_token": "<IMG_CONTEXT>", "fake_image_token": "<image>", "start_image_token": "<img>"}
NESTED = {  # as newer versions save it, all in one file
    "image_processor": {**PUBLISHED, "image_processor_type": "GotOcr2ImageProcessor", "max_patches": 3},
    "video_processor": {"video_processor_type": "InternVLVideoProcessor", "size": {"height": TILE, "width": TILE}},
    **PROCESSOR,
}
WIDE = Image.fromarray(noise(90, 30))


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in PUBLISHED.items() if name not in names}


def write(folder: Path, original: Path, settings: dict[str, Any] | None, processor: dict[str, Any] = PROCESSOR) -> Path:
    """A folder with these two files in place of its own."""
    for file in original.iterdir():
        if file.name not in ("processor_config.json", "preprocessor_config.json"):
            (folder / file.name).symlink_to(file)
    (folder / "processor_config.json").write_text(json.dumps(processor))
    if settings is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def read(folder: Path) -> TilePreprocessor:
    preprocessor = read_checkpoint(folder).preprocessor
    assert isinstance(preprocessor, TilePreprocessor)
    return preprocessor


def expected(folder: Path, image: Image.Image, **options: Any) -> tuple[torch.Tensor, int]:
    """transformers' pixels, and its number of image tokens."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    made = processor(images=[image], text="<IMG_CONTEXT>", return_tensors="pt", **options)
    return made["pixel_values"].float(), int((made["input_ids"] == processor.image_token_id).sum())


class Echo(TileTower):
    """Gives the normalised pixels themselves."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2)

    def targets(self) -> dict[str, torch.Tensor]:
        return {}


def check(preprocessor: TilePreprocessor, image: Image.Image, want: tuple[torch.Tensor, int]) -> None:
    config = preprocessor.image
    made = make_tiles(image, config)
    got = Echo(config).encode(torch.from_numpy(made.data), made.units).view(-1, *config.unit.shape)
    assert torch.equal(got, want[0])
    assert made.num_features == preprocessor.count_features(*image.size, "auto") == want[1] <= preprocessor.most_features()


FOLLOWED: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "published": (PUBLISHED, PROCESSOR),
    "older processor_config": (PUBLISHED, OLDER),
    "nested": (None, NESTED),
    "nested beside": ({**PUBLISHED, "max_patches": 1}, NESTED),
    "nested null": (PUBLISHED, {**PROCESSOR, "image_processor": None}),
    "no mean": (without("image_mean", "image_std"), PROCESSOR),  # the class's own, which are not ImageNet's
    "no class": (without("image_processor_type"), PROCESSOR),
    "few keys": ({"size": {"height": TILE, "width": TILE}}, PROCESSOR),
    **{
        json.dumps(changed): ({**PUBLISHED, **changed}, PROCESSOR)
        for changed in (
            *({"crop_to_patches": value} for value in (True, None)),
            *({"size": value} for value in (TILE, [TILE, TILE])),
            *({"resample": value} for value in (0, 2)),
            *({"min_patches": 5}, {"max_patches": 1}, {"max_patches": 2}, {"min_patches": 5, "max_patches": 2}),
            *({"do_normalize": False}, {"do_normalize": None}, {"do_normalize": False, "do_rescale": False}),
            *(
                {"do_rescale": False},
                {"do_rescale": None},
                {"rescale_factor": 0.5},
                {"do_rescale": False, "rescale_factor": None},
            ),
            *({"do_normalize": False, "image_mean": None, "image_std": 0}, {"do_resize": False}, {"do_convert_rgb": False}),
            *({"image_mean": 0.5}, {"image_mean": [0.5]}, {"image_mean": 0.5, "image_std": 0.5, "do_rescale": False}),
            *({"do_center_crop": True, "crop_size": 20}, {"data_format": "channels_last"}, {"use_fast": False}),
            *({"max_dynamic_patch": 12}, {"use_thumbnail": True}),
        )
    },
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_pixels_and_tokens_equal_transformers(case: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = write(tmp_path, checkpoint(), *FOLLOWED[case])
    check(read(folder), WIDE, expected(folder, WIDE))


def test_the_official_editions_are_tiled(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    preprocessor = read(write(tmp_path, checkpoint(), PUBLISHED))
    assert preprocessor.prepare(WIDE, "auto").num_features == (3 + 1) * 4
    assert preprocessor.prepare(WIDE, "low").num_features == 4


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no size": (without("size"), PROCESSOR),  # 384 then
    "CLIP": ({**without("image_processor_type"), "feature_extractor_type": "CLIPFeatureExtractor"}, PROCESSOR),
    "nested list": (PUBLISHED, {**PROCESSOR, "image_processor": []}),
    "tokens": (PUBLISHED, {**PROCESSOR, "image_seq_length": 256}),
    **{
        json.dumps(changed): ({**PUBLISHED, **changed}, PROCESSOR)
        for changed in (
            *({"size": value} for value in (448, None, "28", {"shortest_edge": TILE}, {"height": TILE}, [TILE, 14], [TILE])),
            {"size": TILE, "default_to_square": False},
            *({"resample": value} for value in (1, 4, 5, 6, None, "bicubic", True)),
            *({"image_mean": value} for value in (None, "a", [0.5, 0.5], [], [0.1, 0.2, None], True, float("nan"))),
            *({"image_std": value} for value in (None, 0, [0.2, 0, 0.2], [0.2] * 4)),
            *({"rescale_factor": value} for value in (None, 0, "1/255")),
            *({"do_rescale": "no"}, {"do_normalize": "false"}, {"image_processor_type": "CLIPImageProcessor"}),
            *({"max_patches": value} for value in ("4", 4.0, None, True, 10**9)),
            *({"min_patches": value} for value in ("4", None)),
            *({"max_dynamic_patch": 6}, {"min_dynamic_patch": 2}, {"dynamic_image_size": False}, {"use_thumbnail": False}),
        )
    },
}
NAMES = {"no size": "size", "CLIP": "image_processor_type", "nested list": "image_processor", "tokens": "image_seq_length"}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_followed_is_refused_by_name(case: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    name = NAMES.get(case) or next(iter(json.loads(case)))
    with pytest.raises(ModelError, match=rf"\b{name}\b"):
        read(write(tmp_path, checkpoint(), *REFUSED[case]))


def test_other_names_for_tiles_in_config_json_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = write(tmp_path, checkpoint(), PUBLISHED)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "max_dynamic_patch": 6}))
    with pytest.raises(ModelError, match="max_dynamic_patch 6 is not read here, where 12 holds; write it as max_patches"):
        read(folder)


def test_without_a_file_settings_are_internvls(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    image = read(write(tmp_path, checkpoint(), None)).image
    assert (image.tile_size, image.max_patches, image.mean) == (TILE, 12, (0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    "options",
    [
        *({"crop_to_patches": value} for value in (False, True)),
        *({"max_patches": 2}, {"max_patches": 20}, {"min_patches": 5}, {"min_patches": 2, "max_patches": 2}),
        *({"crop_to_patches": False, "max_patches": 4}, {"images_kwargs": {"max_patches": 2}}),
    ],
    ids=json.dumps,
)
def test_a_requests_options_equal_transformers(options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = write(tmp_path, checkpoint(), PUBLISHED)
    picture = Image.fromarray(noise(600, 40))
    configured = read(folder).configured(options)
    assert isinstance(configured, TilePreprocessor)
    check(configured, picture, expected(folder, picture, **options))


def test_other_servers_names_for_a_requests_options(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    preprocessor = read(write(tmp_path, checkpoint(), PUBLISHED))
    picture = Image.fromarray(noise(600, 40))

    def features(**options: Any) -> int:
        return preprocessor.configured(options).prepare(picture, "auto").num_features // 4

    assert features() == features(dynamic_image_size=True) == 12 + 1
    assert features(max_dynamic_patch=15) == features(max_patches=15) == 15 + 1
    assert features(max_dynamic_patch=2) == 2 + 1 and features(dynamic_image_size=False) == features(max_dynamic_patch=1) == 1
    assert features(min_dynamic_patch=12) == 12 + 1 and features(max_patches=None) == 12 + 1


@pytest.mark.parametrize(
    ("options", "param"),
    [
        *(({"max_patches": value}, "max_patches") for value in (0, -1, "2", True, 1.5, 10**9)),
        *(({"crop_to_patches": value}, "crop_to_patches") for value in (0, "false")),
        *(({"images_kwargs": {"min_patches": 0}}, "images_kwargs.min_patches"), ({"images_kwargs": 3}, "images_kwargs")),
        *(({"min_patches": 5, most: 2}, "min_patches") for most in ("max_patches", "max_dynamic_patch")),
        *(
            ({"min_patches": 13}, "min_patches"),
            ({"images_kwargs": {"min_dynamic_patch": 13}}, "images_kwargs.min_dynamic_patch"),
        ),
        *(({"max_pixels": 1000}, "max_pixels"), ({"images_kwargs": {"do_resize": False}}, "images_kwargs.do_resize")),
    ],
)
def test_wrong_options_of_a_request_are_named(
    options: dict[str, Any], param: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    preprocessor = read(write(tmp_path, checkpoint(), PUBLISHED))
    with pytest.raises(RequestError) as caught:
        preprocessor.configured(options)
    assert caught.value.param == f"mm_processor_kwargs.{param}" and caught.value.param in str(caught.value)
