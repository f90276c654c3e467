"""A request's body as bytes: read within its bound, and decoded within the same bound where the client compressed it."""

from __future__ import annotations

import asyncio
import gzip
import importlib
import io
import logging
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from starlette.requests import Request

from vlserve.errors import RequestError

log = logging.getLogger(__name__)
Decode = Callable[[bytes, int], bytes]  # a body, and how many bytes are wanted at most


async def read_content(request: Request, most: int) -> bytes:
    """The body, with `most` bytes as sent and as decoded. Raises RequestError."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    decode = None if encoding in ("", "identity") else _find(encoding)
    body = await _read(request, most)
    return body if decode is None else await asyncio.to_thread(_decoded, decode, encoding, body, most)


def known_encodings() -> list[str]:
    """What Content-Encoding may be: gzip and deflate, and what the installed packages give."""
    return list(_decoders())


async def _read(request: Request, most: int) -> bytes:
    body = bytearray()
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:  # said before it is sent
        raise _too_large(most)
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


def _find(encoding: str) -> Decode:
    decoders = _decoders()
    decode = decoders.get(encoding.removeprefix("x-"))
    if decode is None:
        message = f"the body's Content-Encoding is {encoding[:64]!r}; send it plain, or as one of {', '.join(decoders)}"
        raise RequestError(message, code="unsupported_content_encoding")
    return decode


def _decoded(decode: Decode, encoding: str, body: bytes, most: int) -> bytes:
    try:
        found = decode(body, most + 1)
    except Exception:  # noqa: BLE001  (decoders have errors of their own)
        raise RequestError(f"the body is not valid {encoding}, as its Content-Encoding says") from None
    if len(found) > most:
        raise _too_large(most)
    return found


def _too_large(most: int) -> RequestError:
    mib = most / 2**20
    _say_the_option(mib)
    return RequestError(f"the request's body has more than {mib:g} MiB (the server's --max-body-mib)", code="body_too_large")


@cache
def _say_the_option(mib: float) -> None:
    log.warning("a request's body had more than %g MiB and was refused; --max-body-mib N would take it (said once)", mib)


def _decoders() -> dict[str, Decode]:
    found: dict[str, Decode] = {"gzip": _gunzip, "deflate": _inflate}
    if _import("zstandard") is not None or _import("compression.zstd") is not None:
        found["zstd"] = _unzstd
    brotli = _import("brotli")
    if brotli is not None and hasattr(brotli.Decompressor, "can_accept_more_data"):  # from 1.2 on, whose output has a bound
        found["br"] = _unbrotli
    return found


def _gunzip(body: bytes, size: int) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(body)) as file:
        return file.read(size)


def _inflate(body: bytes, size: int) -> bytes:
    """zlib's format, as HTTP means it, or deflate's own, as some send it."""
    decoder = zlib.decompressobj()
    try:
        found = decoder.decompress(body, size)
    except zlib.error:
        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        found = decoder.decompress(body, size)
    if len(found) < size and not decoder.eof:
        raise EOFError
    return found


def _unzstd(body: bytes, size: int) -> bytes:
    """Frames whose window is beyond 128 MiB are refused, by the library's own bound."""
    package, standard = _import("zstandard"), _import("compression.zstd")  # the latter is Python's from 3.14 on
    file = standard.ZstdFile(io.BytesIO(body)) if standard is not None else package.open(io.BytesIO(body), "rb")
    with file:
        return bytes(file.read(size))


def _unbrotli(body: bytes, size: int) -> bytes:
    decoder = _import("brotli").Decompressor()
    found: bytes = decoder.process(body, output_buffer_limit=size)
    while len(found) < size and not decoder.is_finished():
        more = decoder.process(b"", output_buffer_limit=size - len(found))
        if not more:
            raise EOFError
        found += more
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
