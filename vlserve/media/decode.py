"""From encoded pictures, PIL images and arrays to the RGB pixels that a person would see.

Owns decoding, orientation, transparency and the bounds of one picture; knows nothing of where pictures come from.
Every failure is a RequestError in our own words: a library's text may hold paths and addresses.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, features
from PIL.TiffImagePlugin import TiffImageFile

from vlserve.config import MediaConfig
from vlserve.errors import RequestError
from vlserve.system_limits import refused

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", *(name for name in ("WEBP", "AVIF") if features.check(name.lower())))
MAX_JPEG_SCANS = 100  # progressive pictures have about ten; each one is a pass over all pixels
MAX_JPEG_SEGMENTS = 5000  # of 64 KiB at most; colour profiles and cameras' notes take some hundred
TILE_WIDTH, TILE_LENGTH, ORIENTATION = 322, 323, 274  # tags of TIFF and EXIF
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # of a segment or the end; data has 0 or a restart's number after 0xff

Source = Image.Image | np.ndarray[Any, Any] | bytes
# Pictures still in their files are read once, and prompts may share one. Images have no hash, so locks go by identity.
_LOADING = tuple(threading.Lock() for _ in range(64))

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our own bound on pixels is tighter
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of damaged EXIF, which does not matter here


def image_error(param: str, message: str, code: str = "invalid_image") -> RequestError:
    """What is wrong with a picture. `code` is one of OpenAI's words for it."""
    return RequestError(f"{param}: {message}", param=param, code=code)


def measure_image(source: Source, *, param: str, config: MediaConfig) -> tuple[int, int]:
    """(width, height) from the header alone, before any turning. Raises RequestError, also when that is too large."""
    return _open(source, param, config).size


def decode_image(source: Source, *, param: str, config: MediaConfig | None = None) -> Image.Image:
    """The picture in mode RGB: first frame, turned as its EXIF says, transparency on white, 8 bits.

    Args:
        source: an encoded picture, a PIL image, or an array of uint8 [H, W], [H, W, 3] or [H, W, 4].
        param: the request's field, for errors. config: the bounds; default: MediaConfig's.

    Raises RequestError.
    """
    image = _open(source, param, config or MediaConfig())
    try:
        with _LOADING[id(image) // 16 % len(_LOADING)]:
            image.load()
            tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
            image = _upright(image)
        return _to_rgb(image, tags)
    except Exception as error:  # noqa: BLE001  (decoders raise whatever damaged bytes lead them to)
        raise refused(error, "decoding a picture") or _damaged(param) from None


def _open(source: Source, param: str, config: MediaConfig) -> Image.Image:
    """The picture with its header read and its size checked, nothing decoded."""
    if isinstance(source, np.ndarray):
        image = _from_array(source, param)
    elif isinstance(source, Image.Image):
        image = source
    else:
        image = _open_bytes(source, param, config)
    width, height = image.size
    if width <= 0 or height <= 0:
        raise image_error(param, f"the picture is empty ({width}x{height} pixels)")
    if width * height > config.max_image_pixels:
        message = f"the picture has {width}x{height} pixels, the limit is {config.max_image_pixels} in all"
        raise image_error(param, message, "image_too_large")
    return image


def _open_bytes(data: bytes, param: str, config: MediaConfig) -> Image.Image:
    if not data:
        raise image_error(param, "the picture is empty (0 bytes)")
    if len(data) > config.max_image_mib * 2**20:
        limit = config.max_image_mib * 2**20
        raise image_error(param, f"the picture has {len(data)} bytes, the limit is {limit}", "image_file_too_large")
    if data.startswith(b"\xff\xd8") and _has_many_scans(data):
        raise image_error(param, f"the picture has more than {MAX_JPEG_SCANS} scans; save it again", "image_too_large")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_many_pixels(param, config) from None
    except Exception:  # noqa: BLE001  (decoders raise whatever damaged bytes lead them to)
        raise _damaged(param) from None
    if isinstance(image, TiffImageFile):  # libtiff decodes whole tiles, however small the picture is
        width, length = image.tag_v2.get(TILE_WIDTH, 0), image.tag_v2.get(TILE_LENGTH, 0)
        if not isinstance(width, int) or not isinstance(length, int):
            raise _damaged(param)
        if width * length > 2 * image.width * image.height + 2**20:
            raise image_error(param, "the picture's tiles are far larger than the picture; save it again", "image_too_large")
    return image


def _has_many_scans(data: bytes) -> bool:
    """Of a JPEG, up to its end; phones put films and further pictures behind it. Walks as libjpeg does: a segment's payload,
    such as a preview with scans of its own, is stepped over."""
    scans, place = 0, 2
    for _ in range(MAX_JPEG_SEGMENTS):
        found = _MARKER.search(data, place)
        if found is None or found[1] == b"\xd9":
            return False
        scans += found[1] == b"\xda"
        if scans > MAX_JPEG_SCANS:
            return True
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return True


def _from_array(array: np.ndarray[Any, Any], param: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise image_error(
            param, f"expected an array of uint8, [H, W], [H, W, 3] or [H, W, 4]; got {array.dtype} {list(array.shape)}"
        )
    if 0 in array.shape:
        raise image_error(param, f"the picture is empty ({list(array.shape)})")
    return Image.fromarray(array)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; the picture itself where there is nothing to turn, or EXIF is damaged."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001  (people see the picture all the same)
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """8 bits, transparency on white; the picture itself if it is that already. `tags`: of a TIFF."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image, tags)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Grey of 12, 16 or 32 bits, signed or real numbers; Pillow's own conversion clips at 255."""
    samples = np.asarray(image)
    (bits, *_) = tags.get(BITS_PER_SAMPLE, (16,))
    if image.mode.startswith("I;16"):
        grey = (samples >> min(8, bits - 8)).astype(np.uint8)
    else:
        is_unsigned = bits == 32 and tags.get(SAMPLE_FORMAT, (1,))[0] == 1  # which Pillow reads as signed
        grey = _by_range(samples.view(np.uint32) if is_unsigned and image.mode == "I" else samples)
    if tags.get(PHOTOMETRIC) == 0:
        grey = 255 - grey  # 0 is white
    if (transparent := image.info.get("transparency")) is not None:
        grey = np.where(samples == transparent, np.uint8(255), grey)
    return Image.fromarray(grey)


def _by_range(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of no fixed range to 0..255: as 0..1 (real numbers only), 0..255 or 0..65535, the first that they fit in, an eighth
    more or less, since filters overshoot; else from the least to the greatest. NaN is black."""
    is_real = samples.dtype.kind == "f"
    finite = np.isfinite(samples)
    if not finite.any():
        return np.zeros(samples.shape, np.uint8)
    least, greatest = (float(edge) for edge in (samples[finite].min(), samples[finite].max()))
    for top in (1, 255, 65535) if is_real else (255, 65535):
        if -8 * least <= greatest <= top * 9 / 8:
            least, greatest = 0.0, float(top)
            break
    scaled = samples.astype(np.float32)
    with np.errstate(over="ignore"):  # infinite is white
        scaled -= least
        scaled *= 255 / ((greatest - least) or 1)
    np.nan_to_num(scaled, copy=False, nan=0, posinf=255, neginf=0)
    return (scaled.clip(0, 255) + 0.5).astype(np.uint8)


def _damaged(param: str) -> RequestError:
    return image_error(param, f"the picture cannot be decoded; it is damaged or not one of {', '.join(FORMATS)}")


def _too_many_pixels(param: str, config: MediaConfig) -> RequestError:
    return image_error(param, f"the picture has more than {config.max_image_pixels} pixels", "image_too_large")
