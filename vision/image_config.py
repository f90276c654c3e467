"""What an image processor's file says of tiles and pixels, read as transformers' InternVLProcessor does. No torch is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlserve.vision.config import EncoderConfig
from vlserve.vision.pixels import Unit
from vlserve.vision.tiling import Grid, choose_grid

MAX_PATCHES = 256  # tiles of one picture, whoever asks for them
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as torch resizes by them
# GotOcr2ImageProcessor's own settings, where the file has none; InternVLProcessor passes crop_to_patches=True over any
_DEFAULTS: Mapping[str, Any] = {
    "size": {"height": 384, "width": 384},
    "default_to_square": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "min_patches": 1,
    "max_patches": 12,
}
_PROCESSORS = ("GotOcr2ImageProcessor", "GotOcr2ImageProcessorFast")
# settings of OpenGVLab's own config.json, which transformers' processor does not read, and what it does instead
_OTHER_NAMES = {
    "max_dynamic_patch": ("max_patches", None),
    "min_dynamic_patch": ("min_patches", None),
    "dynamic_image_size": ("crop_to_patches", True),
    "use_thumbnail": (None, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """How a picture becomes tiles; part of the digest, since each field changes the pixels."""

    tile_size: int  # pixels
    tokens_per_tile: int
    min_patches: int = 1
    max_patches: int = 12
    dynamic: bool = True
    thumbnail: bool = True  # of a picture of several tiles, as its last one
    pad_to_square: bool = False  # with the mean colour, where there is no tiling
    resize: str = "torch"  # or pillow; their last bits differ
    resample: str = "bicubic"  # torch's name
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def unit(self) -> Unit:
        """What a tile is to the encoder."""
        return Unit((3, self.tile_size, self.tile_size), self.tokens_per_tile)

    @property
    def most_tiles(self) -> int:
        """Of any picture."""
        return self._with_thumbnail(self.max_patches) if self.dynamic else 1

    def grid(self, height: int, width: int) -> Grid:
        """The tiles of a picture of so many pixels, without its thumbnail."""
        if not self.dynamic:
            return Grid(1, 1)
        limits = {"min_patches": self.min_patches, "max_patches": self.max_patches}
        return choose_grid(height, width, tile_size=self.tile_size, **limits)

    def num_tiles(self, height: int, width: int) -> int:
        """Tiles that the encoder sees of a picture of so many pixels, the thumbnail included."""
        return self._with_thumbnail(self.grid(height, width).cells)

    def _with_thumbnail(self, cells: int) -> int:
        return cells + (self.thumbnail and cells > 1)


def read_image_config(settings: Mapping[str, Any], encoder: EncoderConfig) -> ImageConfig:
    """What transformers' InternVLProcessor does with an image processor's file; a null there is no default, as it is none there.

    Args:
        settings: preprocessor_config.json, or the `image_processor` part of processor_config.json; empty where neither is there,
            which transformers would not load: as InternVL's have it then.
    """
    settings = settings or {"size": encoder.image_size, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or _PROCESSORS[0]
    if kind not in _PROCESSORS:
        raise ValueError(
            f"image_processor_type {kind!r} is not supported; supported: {', '.join(_PROCESSORS)}. "
            "The preprocessor_config.json of the model's '-hf' edition has it"
        )
    given = {**_DEFAULTS, **settings}
    low, high = _whole(given, "min_patches"), _whole(given, "max_patches")
    check_other_names(settings, low, high)
    if high > MAX_PATCHES:
        raise ValueError(f"max_patches is {high}; supported: up to {MAX_PATCHES}")
    return ImageConfig(
        tile_size=_tile_size(given, encoder.image_size),
        tokens_per_tile=encoder.tokens_per_tile,
        min_patches=low,
        max_patches=high,
        **read_pixel_settings(given),
    )


def read_pixel_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """How pixels are resized and normalised, as fields of ImageConfig; `given`: a file, with the class's defaults filled in."""
    rescales, normalises = _truth(given, "do_rescale"), _truth(given, "do_normalize")
    resample = given["resample"]
    if isinstance(resample, bool) or not isinstance(resample, int) or resample not in RESAMPLE:
        names = ", ".join(f"{number} ({name})" for number, name in RESAMPLE.items())
        raise ValueError(f"resample {resample!r} is not supported; supported: {names}")
    return {
        "resample": RESAMPLE[resample],
        "rescale_factor": _number("rescale_factor", given["rescale_factor"], zero=False) if rescales else 1.0,
        "do_normalize": normalises,
        "mean": _by_channel(given, "image_mean") if normalises else (0.0,) * 3,
        "std": _by_channel(given, "image_std", zero=False) if normalises else (1.0,) * 3,
    }


def check_other_names(settings: Mapping[str, Any], min_patches: int, max_patches: int) -> None:
    """Settings under OpenGVLab's names have no effect on transformers' processor: refused, unless they say what is so anyway."""
    actual = {"min_patches": min_patches, "max_patches": max_patches}
    for key, (name, value) in _OTHER_NAMES.items():
        expected = actual.get(name or "", value)
        if settings.get(key) is not None and settings[key] != expected:
            way_out = f"write it as {name}" if name in actual else f"supported: {str(expected).lower()}"
            raise ValueError(f"{key} {settings[key]!r} is not read here, where {expected!r} holds; {way_out}")


def _tile_size(given: Mapping[str, Any], expected: int) -> int:
    """The side of a tile; `size` is a number, [height, width] or {height, width}."""
    size = given["size"]
    if isinstance(size, int) and given["default_to_square"]:
        size = [size, size]
    elif isinstance(size, Mapping):
        kept = {key: side for key, side in size.items() if side is not None}
        size = [kept["height"], kept["width"]] if set(kept) == {"height", "width"} else None
    if not isinstance(size, (list, tuple)) or list(size) != [expected, expected]:
        raise ValueError(
            f"the image processor's size is {given['size']!r}; expected the encoder's image_size, "
            f'{{"height": {expected}, "width": {expected}}}'
        )
    return expected


def _truth(given: Mapping[str, Any], key: str) -> bool:
    value = given[key]
    if value not in (True, False, None):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return bool(value)


def _whole(given: Mapping[str, Any], key: str) -> int:
    value = given[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; expected a whole number")
    return value


def _number(key: str, value: Any, *, zero: bool = True) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not (zero or value):
        raise ValueError(f"{key} is {value!r}; expected a number" + ("" if zero else " other than 0"))
    return float(value)


def _by_channel(given: Mapping[str, Any], key: str, *, zero: bool = True) -> tuple[float, ...]:
    """Three numbers; one alone is for all channels."""
    value = given[key]
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(numbers) not in (1, 3):
        raise ValueError(f"{key} has {len(numbers)} numbers; expected three, or one for all channels")
    found = tuple(_number(key, number, zero=zero) for number in numbers)
    return found * 3 if len(found) == 1 else found
