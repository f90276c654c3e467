"""How a picture of any size is resized: to whole features, within bounds of pixels. Read as transformers' Qwen2VLImageProcessor
does. No torch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlserve.vision.image_config import read_pixel_settings
from vlserve.vision.pixels import Unit

MOST_RATIO = 200  # of a picture's longer side to its shorter one
LOW_PIXELS = 512 * 512  # of a picture of `detail: low`
MOST_PIXELS = 2**28  # that a file may allow
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast")
# Qwen2VLImageProcessor's own settings, where the file has none
_DEFAULTS: Mapping[str, Any] = {
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}  # pixels of a picture, and no edges


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeConfig:
    """Part of the digest, since each field changes the pixels or what is made of them.

    Args:
        merge_size: patches along a side of a square that becomes one feature.
        resized: (height, width) of every picture before it is rounded to whole features, in place of its own.
    """

    patch_size: int  # pixels
    merge_size: int
    temporal_patch_size: int  # frames in a patch; a picture is so many times the same
    min_pixels: int
    max_pixels: int
    resized: tuple[int, int] | None = None
    resample: str = "bicubic"  # torch's name
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def factor(self) -> int:
        """Pixels along the side of what becomes one feature."""
        return self.patch_size * self.merge_size

    @property
    def most_features(self) -> int:
        """Of one picture; of the narrowest, whose short side is one feature, or of the smallest, whose sides are rounded up."""
        area = self.factor**2
        narrow = math.isqrt(MOST_RATIO * self.max_pixels) // self.factor
        least = self.min_pixels / area
        small = math.ceil(least + math.sqrt(MOST_RATIO * least) + math.sqrt(least / MOST_RATIO) + 1)
        return max(self.max_pixels // area, narrow, small, 1)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """What a picture of so many pixels is resized to; raises ValueError where it is too narrow."""
        height, width = self.resized or (height, width)
        return smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)

    def unit(self, height: int, width: int) -> Unit:
        """A resized picture, as the encoder takes it."""
        return Unit((3, height, width), height * width // self.factor**2)

    def with_limits(self, least: int, most: int) -> NativeConfig:
        return replace(self, min_pixels=min(least, most), max_pixels=most)

    def low(self) -> NativeConfig:
        """For `detail: low`."""
        return self.with_limits(self.min_pixels, min(self.max_pixels, LOW_PIXELS))


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, as near to the picture's shape as they can be, with min_pixels to max_pixels in
    all. A side is one `factor` at least, and rounding up may lead beyond max_pixels. Source: transformers' function of this name.
    """
    long, short = max(height, width), min(height, width)
    if long > MOST_RATIO * short:
        raise ValueError(f"the picture has {width}x{height} pixels; its sides may be up to {MOST_RATIO}:1; cut or pad it")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / beta / factor) * factor)
        columns = max(factor, math.floor(width / beta / factor) * factor)
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / factor) * factor
        columns = math.ceil(width * beta / factor) * factor
    return rows, columns


def read_native_config(settings: Mapping[str, Any], *, encoder: Mapping[str, int], published: Mapping[str, Any]) -> NativeConfig:
    """What transformers' Qwen2VLImageProcessor does with its file.

    Args:
        settings: preprocessor_config.json, or the `image_processor` part of processor_config.json; empty where neither is there,
            which transformers would not load: as `published` then.
        encoder: the vision encoder's `patch_size`, `merge_size` and `temporal_patch_size`, which the file must have too.

    Raises ValueError naming the key.
    """
    settings = settings or published
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or _PROCESSORS[0]
    if kind not in _PROCESSORS:
        raise ValueError(f"image_processor_type {kind!r} is not supported; supported: {', '.join(_PROCESSORS)}")
    given = {**_DEFAULTS, **settings}
    if not given["do_resize"]:
        raise ValueError(f"do_resize {given['do_resize']!r} is not supported; supported: true")
    for key, value in encoder.items():
        if given[key] != value:
            raise ValueError(f"the image processor's {key} is {given[key]!r}, and the vision encoder has {value}")
    least, most = _limits(settings)
    return NativeConfig(
        patch_size=encoder["patch_size"],
        merge_size=encoder["merge_size"],
        temporal_patch_size=encoder["temporal_patch_size"],
        min_pixels=least,
        max_pixels=most,
        **read_pixel_settings(given),
    )


def _limits(settings: Mapping[str, Any]) -> tuple[int, int]:
    """`size` with shortest_edge and longest_edge, over which min_pixels and max_pixels count; `size` may have these names too."""
    size = settings.get("size")
    if size is None:
        size = _SIZE
    if not isinstance(size, Mapping):
        raise ValueError(f"the image processor's size is {size!r}; expected an object with shortest_edge and longest_edge")
    found = []
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        value = next((v for v in (settings.get(name), size.get(edge), size.get(name)) if v is not None), None)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_PIXELS:
            raise ValueError(f"the image processor's {name} (or size.{edge}) is {value!r}; expected 1 to {MOST_PIXELS} pixels")
        found.append(value)
    least, most = found
    if least > most:
        raise ValueError(f"the image processor's min_pixels {least} is more than its max_pixels {most}")
    return least, most
