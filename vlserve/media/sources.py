"""What a picture's source gives without any network: data URLs, files, bytes, and PIL images and arrays as they are.

Owns who may read which file: Python any, an HTTP request those below one folder.
"""

from __future__ import annotations

import base64
import binascii
import errno
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from vlserve.config import MediaConfig
from vlserve.errors import RequestError
from vlserve.media.decode import Source, image_error
from vlserve.prompt.chat_messages import ImagePart
from vlserve.system_limits import refused

log = logging.getLogger(__name__)
MAX_PERCENT = 2**20  # characters of %xx; taking them apart takes fifty times their memory
EXPECTED = "expected a data: or http(s): URL; for base64 begin with data:image/png;base64,"
BLANKS = "\t\n\f\r "
_BASE64 = re.compile(r";[\t\n\f\r ]*base64[\t\n\f\r ]*\Z", re.IGNORECASE)  # at a data: URL's comma
_ESCAPES = {
    escape: character
    for character in (b"+", b"/", b"=", b"\n", b"\r", b" ")
    for escape in {b"%%%02X" % character[0], b"%%%02x" % character[0]}
}
_ALPHABET = bytes.maketrans(b"-_", b"+/")  # the alphabet for URLs
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # opening a pipe must not wait for its other end


def scheme_of(source: Any) -> str:
    """Of a URL that pictures may have, in lower case; empty for anything else. Blanks before it do not count."""
    scheme, colon, _ = source[:64].lstrip(BLANKS)[:6].lower().partition(":") if isinstance(source, str) else ("", "", "")
    return scheme if colon and scheme in ("data", "file", "http", "https") else ""


def read_source(part: ImagePart, config: MediaConfig) -> Source:
    """Bytes, or the PIL image or array itself. Raises RequestError for anything else, and for URLs that must be fetched."""
    source, param = part.source, part.param
    scheme = scheme_of(source)
    if scheme == "data":
        return _read_data_url(source, param, config)
    if scheme == "file":
        return _read_file_url(source.strip(BLANKS), part, config)
    if isinstance(source, (str, os.PathLike)):
        if not part.local:
            raise image_error(param, EXPECTED, "invalid_image_url")
        return _read_path(source, param, config)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (Image.Image, np.ndarray)):
        return source
    raise image_error(param, f"a {type(source).__name__} is no picture; give a PIL image, path, URL, data URL, bytes or array")


def _read_data_url(url: str, param: str, config: MediaConfig) -> bytes:
    """The data: URL's bytes, as the WHATWG's Fetch standard reads them; whatever type it states."""
    header, comma, body = url.partition(",")
    if not comma:
        raise image_error(param, "the data: URL has no comma and so no data", "invalid_image_url")
    body = body.partition("#")[0]
    limit = config.max_image_mib * 2**20
    if not _BASE64.search(header):
        if len(body) > MAX_PERCENT:
            message = f"a data: URL without ;base64 may have {MAX_PERCENT} characters; send the picture as base64"
            raise image_error(param, message, "image_file_too_large")
        return unquote_to_bytes(body)
    encoded = _plain_base64(body, param)
    if len(encoded) > limit // 3 * 4 + 8:
        raise image_error(param, f"the picture has more than {limit} bytes", "image_file_too_large")
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise _damaged_base64(param) from None


def _plain_base64(body: str, param: str) -> bytes:
    """Without escapes, blanks and padding, in the alphabet of most; encoders differ in these."""
    try:
        encoded = body.encode("ascii")
    except UnicodeEncodeError:
        raise _damaged_base64(param) from None
    if b"%" in encoded:
        for escape, character in _ESCAPES.items():  # all that encoders escape; linear, unlike taking them apart
            encoded = encoded.replace(escape, character)
        if encoded.count(b"%") > MAX_PERCENT // 3:
            raise _damaged_base64(param)
        encoded = unquote_to_bytes(encoded)
    encoded = encoded.translate(_ALPHABET, BLANKS.encode())
    return encoded.removesuffix(b"=").removesuffix(b"=")


def _damaged_base64(param: str) -> RequestError:
    return image_error(param, "the data: URL's base64 is damaged", "invalid_base64_image")


def _read_file_url(url: str, part: ImagePart, config: MediaConfig) -> bytes:
    """A file: URL. From HTTP only below allowed_local_media_path, and one message for all that is not there."""
    try:
        parts = urlsplit(url)
        path = os.fsdecode(unquote_to_bytes(parts.path))
        is_plain = parts.netloc in ("", "localhost") and not parts.query and not parts.fragment
    except ValueError:
        is_plain = False
    if not is_plain or "\0" in path or not path.startswith("/"):
        raise image_error(part.param, "expected a file URL such as file:///folder/picture.png", "invalid_image_url")
    if part.local:
        return _read_path(path, part.param, config)
    if config.allowed_local_media_path is None:
        log.info("a file: URL was refused; --allowed-local-media-path FOLDER would give the pictures below a folder")
        message = EXPECTED + "; this server gives no files"
        raise image_error(part.param, message, "invalid_image_url")
    try:
        return _read_open_file(_open_below(config.allowed_local_media_path, path), part.param, config)
    except (OSError, ValueError) as error:
        known = refused(error, "reading a picture's file")
        if known is not None:
            raise known from None
        reason = error.strerror if isinstance(error, OSError) else "it is not below it"
        log.info("a file: URL was refused: %s; see --allowed-local-media-path and the rights of the files below it", reason)
        message = "no such picture in the folder that this server gives files from"
        raise image_error(part.param, message, "image_file_not_found") from None


def _read_path(path: str | os.PathLike[str], param: str, config: MediaConfig) -> bytes:
    try:
        return _read_open_file(os.open(os.path.expanduser(path), _OPEN), param, config)
    except (OSError, ValueError) as error:
        known = refused(error, "reading a picture's file")
        if known is not None:
            raise known from None
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise image_error(param, f"cannot read {path}: {reason}", "image_file_not_found") from None


def _open_below(root: str, path: str) -> int:
    """Opens the file that a path really is, if that is below the root; raises OSError or ValueError.

    The path is resolved first and then opened part by part without following links, so that one that is
    swapped in between leads nowhere.
    """
    root = os.path.realpath(root, strict=True)
    parts = Path(os.path.realpath(path, strict=True)).relative_to(root).parts
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in parts[:-1]:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = below
        return os.open(parts[-1] if parts else ".", _OPEN | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)


def _read_open_file(descriptor: int, param: str, config: MediaConfig) -> bytes:
    """All of a regular file. What has no size, such as the files of /proc, counts as empty."""
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        limit = config.max_image_mib * 2**20
        if status.st_size > limit:
            message = f"the picture has {status.st_size} bytes, the limit is {limit}"
            raise image_error(param, message, "image_file_too_large")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)
