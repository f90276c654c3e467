"""From whatever names a picture to the RGB pixels that a person would see.

Owns decoding, orientation, transparency and the bounds on all of them, and the fetching of URLs with
its network rules. Every failure is a RequestError in our own words: a library's text may hold paths and
addresses.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import os
import socket
import threading
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import numpy as np
from PIL import Image, ImageOps

from vlserve.errors import RequestError

MAX_BYTES = 32 * 2**20  # of one encoded picture
MAX_PIXELS = 64_000_000  # of one picture
MAX_IMAGES = 64  # in one request
FETCH_SECONDS = 20.0
MAX_REDIRECTS = 3
_LOADING = threading.Lock()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our own bound on pixels is tighter
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode_image(source: Any, *, param: str, local: bool = False) -> Image.Image:
    """An RGB picture from a PIL image, uint8 array, bytes, data URL, or (only if `local`) a path.

    Raises RequestError naming `param`.
    """
    if isinstance(source, Image.Image):
        return _decode(source, param)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, param), param)
    if isinstance(source, str) and source.startswith("data:"):
        source = _read_data_url(source, param)
    elif isinstance(source, (str, os.PathLike)):
        if not local:
            raise _refusal(param, "expected a data: or http(s): URL")
        source = _read_file(source, param)
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise _refusal(param, f"a {type(source).__name__} is no picture; give a PIL image, path, URL, data URL, bytes or array")
    if len(source) > MAX_BYTES:
        raise _refusal(param, f"the picture has {len(source)} bytes, the limit is {MAX_BYTES}")
    return _decode(source, param)


def _decode(source: Image.Image | bytes | bytearray | memoryview, param: str) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            with _LOADING:  # a picture that is still in its file reads it once, and prompts may share the picture
                source.load()
            return _to_rgb(source, param)
        return _to_rgb(Image.open(io.BytesIO(source), formats=FORMATS), param)
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise _refusal(param, f"the picture has more than {MAX_PIXELS} pixels") from None
    except Exception:  # noqa: BLE001  (decoders raise whatever damaged bytes lead them to)
        raise _refusal(param, f"the picture cannot be decoded; it is damaged or not one of {', '.join(FORMATS)}") from None


async def fetch(url: str, *, param: str) -> bytes:
    """The bytes behind an http(s) URL on the public internet, within the bounds of this file.

    The name is resolved once and the connection goes to the very address that was checked, on every
    redirect again; proxies from the environment are not used, since one would undo the check.
    """
    try:
        return await asyncio.wait_for(_fetch(url, param), FETCH_SECONDS)
    except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
        raise _refusal(param, f"the picture did not arrive within {FETCH_SECONDS:g} s") from None


async def _fetch(url: str, param: str) -> bytes:
    import httpx2  # here: the front starts without it

    try:
        async with httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=FETCH_SECONDS) as client:
            for _ in range(MAX_REDIRECTS + 1):
                host, address = await _resolve(url, param)
                parts = httpx2.URL(url)
                pinned = parts.copy_with(host=address, username=None, password=None)
                headers = {"Host": parts.netloc.decode("ascii").rpartition("@")[2], "User-Agent": "vlserve"}
                async with client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": host}) as response:
                    if response.has_redirect_location:
                        url = urljoin(url, response.headers["location"])
                        continue
                    if response.status_code != 200:
                        raise _refusal(param, f"the picture's server answered {response.status_code}")
                    data = bytearray()
                    async for chunk in response.aiter_bytes():
                        data += chunk
                        if len(data) > MAX_BYTES:
                            raise _refusal(param, f"the picture has more than {MAX_BYTES} bytes")
                    return bytes(data)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError):
        raise _refusal(param, "the picture could not be fetched") from None
    raise _refusal(param, f"the picture's URL leads on more than {MAX_REDIRECTS} times")


async def _resolve(url: str, param: str) -> tuple[str, str]:
    """(host name, public address); refuses everything else."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "\\" in url:
        raise _refusal(param, "expected a data: or http(s): URL")
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except (OSError, ValueError, UnicodeError):
        raise _refusal(param, "the picture's host is not known") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise _refusal(param, "the picture's host is not on the public internet")
    return parts.hostname, addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is global, also after unwrapping the forms of IPv6 that carry an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(v4 is not None and not v4.is_global for v4 in inner):
            return False
    return ip.is_global and not ip.is_multicast


def _to_rgb(image: Image.Image, param: str) -> Image.Image:
    """First frame, turned as its EXIF says, transparency on white, 8 bits."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _refusal(param, f"the picture has {width}x{height} pixels, the limit is {MAX_PIXELS}")
    if width == 0 or height == 0:
        raise _refusal(param, f"the picture is empty ({width}x{height} pixels)")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey; Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(np.nan_to_num(np.asarray(image)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray[Any, Any], param: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise _refusal(
            param, f"expected an array of uint8, [H, W], [H, W, 3] or [H, W, 4]; got {array.dtype} {list(array.shape)}"
        )
    if 0 in array.shape:
        raise _refusal(param, f"the picture is empty ({list(array.shape)})")
    return Image.fromarray(array)


def _read_data_url(url: str, param: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise _refusal(param, "the data: URL has no comma and so no data")
    if len(body) > 2 * MAX_BYTES:
        raise _refusal(param, f"the picture has more than {MAX_BYTES} bytes")
    if not header.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise _refusal(param, "the data: URL's base64 is damaged") from None


def _read_file(path: str | os.PathLike[str], param: str) -> bytes:
    path = Path(path).expanduser()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _refusal(param, f"{path} has {path.stat().st_size} bytes, the limit is {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise _refusal(param, f"cannot read {path}: {error.strerror}") from None


def _refusal(param: str, message: str) -> RequestError:
    return RequestError(f"{param}: {message}", param=param, code="invalid_image")
