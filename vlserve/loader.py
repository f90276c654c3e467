"""Loads the pictures of a request: fetched together, measured before anything is decoded, then cut by worker threads.

Owns the request's budgets, the workers, and files. Threads are enough: decoders, the resize and the digest release the
interpreter's lock, and what remains under it is a few per cent of the work.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import os
import stat
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from vlserve.config import MediaConfig
from vlserve.errors import EngineError, RequestError
from vlserve.media import Source, decode_image, image_error, measure_image
from vlserve.messages import ImagePart
from vlserve.observer import PreparationClock
from vlserve.vision.config import ImageConfig
from vlserve.vision.tiling import choose_grid

if TYPE_CHECKING:
    from vlserve.fetch import Fetcher
    from vlserve.vision.preprocess import ImageTiles

T = TypeVar("T")
LARGE_PIXELS = 16_000_000  # pictures above are decoded one at a time, since one can take 30 bytes a pixel


class PictureLoader:
    """For many requests and event loops at once. `close` ends the workers."""

    def __init__(self, config: MediaConfig) -> None:
        self.config = config
        self._num_workers = config.media_workers or min(8, os.cpu_count() or 1)
        self._workers = ThreadPoolExecutor(self._num_workers, thread_name_prefix="vlserve-picture")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="vlserve-large-picture")
        self._fetched = _Account(config.max_fetched_mib * 2**20)
        # torch and the HTTP client take seconds to import, which overlaps with the engine's start
        self._workers.submit(import_module, "vlserve.vision.preprocess")
        self._fetcher = self._workers.submit(_make_fetcher, config)

    async def load(
        self,
        parts: Sequence[ImagePart],
        image_config: ImageConfig,
        *,
        max_tokens: int | None = None,
        clock: PreparationClock | None = None,
    ) -> list[ImageTiles]:
        """The tiles of one request's pictures, in order.

        Args:
            clock: is told what each picture took.
            max_tokens: image tokens that cannot fit the context anyway; a request that needs more is refused undecoded.

        Raises RequestError naming the field, EngineError when too much is being fetched for others.
        """
        if len(parts) > self.config.limit_images_per_prompt:
            limit = self.config.limit_images_per_prompt
            raise RequestError(f"{len(parts)} pictures in one request; the limit is {limit}", param="messages")
        if not parts:
            return []
        clock = clock or PreparationClock()
        configs = [replace(image_config, dynamic=False) if part.low else image_config for part in parts]
        loop = asyncio.get_running_loop()
        with self._fetched.reserved() as reserved:
            budget = _Budget(self.config.max_request_image_mib * 2**20)
            fetched = await self._fetch(parts, budget, reserved, clock)
            plan = await loop.run_in_executor(self._workers, self._measure, parts, configs, fetched, budget)
            if max_tokens is not None and plan.num_tokens > max_tokens:
                raise RequestError(
                    f"the pictures take {plan.num_tokens} tokens or more, and max_model_len is {max_tokens}; "
                    "send fewer or smaller pictures, or detail: low",
                    param="messages",
                    code="context_length_exceeded",
                )
            turns = asyncio.Semaphore(self._num_workers)  # so that a request of many pictures leaves room for others

            async def cut(index: int) -> ImageTiles:
                async with turns:
                    pool = self._large if plan.is_large[index] else self._workers
                    source, plan.sources[index] = plan.sources[index], None
                    return await loop.run_in_executor(pool, self._cut, source, parts[index].param, configs[index], clock)

            return await _all([cut(index) for index in range(len(parts))])

    def close(self) -> None:
        for pool in (self._workers, self._large):
            pool.shutdown(wait=False)

    async def _fetch(
        self, parts: Sequence[ImagePart], budget: _Budget, reserved: _Reserved, clock: PreparationClock
    ) -> dict[int, bytes]:
        """By index, what had to be fetched."""
        urls = {index: part for index, part in enumerate(parts) if _scheme(part.source) in ("http", "https")}
        if not urls:
            return {}

        def take(count: int, param: str) -> None:
            budget.take(count, param)
            reserved.take(count)

        fetcher: Fetcher = await asyncio.shield(asyncio.wrap_future(self._fetcher))
        bodies = await fetcher.fetch_all([(part.source, part.param) for part in urls.values()], take, clock)
        return dict(zip(urls, bodies, strict=True))

    def _measure(
        self, parts: Sequence[ImagePart], configs: Sequence[ImageConfig], fetched: dict[int, bytes], budget: _Budget
    ) -> _Plan:
        """In a worker: read what is here already, and check sizes from the headers."""
        plan = _Plan(sources=[], is_large=[], num_tokens=0)
        num_pixels = 0
        for index, (part, config) in enumerate(zip(parts, configs, strict=True)):
            source = fetched.pop(index) if index in fetched else read_source(part, self.config)
            if isinstance(source, bytes) and _scheme(part.source) not in ("http", "https"):
                budget.take(len(source), part.param)
            width, height = measure_image(source, param=part.param, config=self.config)
            num_pixels += width * height
            if num_pixels > self.config.max_request_image_pixels:
                limit = self.config.max_request_image_pixels
                raise image_error(
                    part.param, f"the pictures up to this one have {num_pixels} pixels, the limit is {limit}", "image_too_large"
                )
            plan.sources.append(source)
            # an AVIF file's header does not bind its frames; the decoder has a bound of its own, like a large picture's
            is_avif = isinstance(source, bytes) and source[4:8] == b"ftyp"
            plan.is_large.append(width * height > LARGE_PIXELS or is_avif)
            plan.num_tokens += min(_num_tokens(width, height, config), _num_tokens(height, width, config))  # EXIF may turn it
        return plan

    def _cut(self, source: Source, param: str, config: ImageConfig, clock: PreparationClock) -> ImageTiles:
        """In a worker: one picture from its source to tiles."""
        from vlserve.vision.preprocess import make_tiles  # imports torch, which the front does while the rank loads

        with clock.measure(clock.decode_s):
            image = decode_image(source, param=param, config=self.config)
        with clock.measure(clock.tiling_s):
            return make_tiles(image, config)


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What is to be decoded; sources go as they are used."""

    sources: list[Any]
    is_large: list[bool]
    num_tokens: int  # at least


class _Budget:
    """Encoded bytes that one request's pictures may have together."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, 0

    def take(self, count: int, param: str) -> None:
        self._taken += count
        if self._taken > self._limit:
            message = f"the pictures of the request up to this one have more than {self._limit} bytes"
            raise image_error(param, message, "image_file_too_large")


class _Account:
    """Fetched bytes in memory, of all requests. Nobody waits here: two requests could wait for each other."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._lock = limit, 0, threading.Lock()

    @contextmanager
    def reserved(self) -> Iterator[_Reserved]:
        reserved = _Reserved(self)
        try:
            yield reserved
        finally:
            with self._lock:
                self._held -= reserved.count

    def add(self, count: int) -> None:
        with self._lock:
            if self._held + count > self._limit:
                raise EngineError("too many pictures are being fetched for other requests; try again")
            self._held += count


class _Reserved:
    """One request's share of an account, given back when the request is prepared."""

    def __init__(self, account: _Account) -> None:
        self._account, self.count = account, 0

    def take(self, count: int) -> None:
        self._account.add(count)
        self.count += count


def read_source(part: ImagePart, config: MediaConfig) -> Source:
    """What needs no network: a data or file URL, a path where paths are allowed, bytes; PIL images and arrays as they are."""
    source, param = part.source, part.param
    scheme = _scheme(source)
    if scheme == "data":
        return _read_data_url(source, param, config)
    if scheme == "file":
        return _read_file_url(source, part, config)
    if isinstance(source, (str, os.PathLike)):
        if not part.local:
            raise image_error(param, "expected a data: or http(s): URL", "invalid_image_url")
        return _read_path(Path(source).expanduser(), param, config)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (Image.Image, np.ndarray)):
        return source
    raise image_error(param, f"a {type(source).__name__} is no picture; give a PIL image, path, URL, data URL, bytes or array")


def _read_data_url(url: str, param: str, config: MediaConfig) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise image_error(param, "the data: URL has no comma and so no data", "invalid_image_url")
    limit = config.max_image_mib * 2**20
    if len(body) > 3 * limit + 4:  # %xx, the longest form
        raise image_error(param, f"the picture has more than {limit} bytes", "image_file_too_large")
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise image_error(param, "the data: URL's base64 is damaged", "invalid_base64_image") from None


def _read_file_url(url: str, part: ImagePart, config: MediaConfig) -> bytes:
    """A file: URL. From HTTP only below allowed_local_media_path, and one message for all that is not there."""
    parts = urlsplit(url)
    path = os.fsdecode(unquote_to_bytes(parts.path))
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in path or not path.startswith("/"):
        raise image_error(part.param, "expected a file URL such as file:///folder/picture.png", "invalid_image_url")
    if part.local:
        return _read_path(Path(path), part.param, config)
    if config.allowed_local_media_path is None:
        message = "expected a data: or http(s): URL; this server gives no files"
        raise image_error(part.param, message, "invalid_image_url")
    try:
        return _read_open_file(_open_below(config.allowed_local_media_path, path), part.param, config)
    except (OSError, ValueError):
        message = "no such picture in the folder that this server gives files from"
        raise image_error(part.param, message, "image_file_not_found") from None


def _read_path(path: Path, param: str, config: MediaConfig) -> bytes:
    try:
        return _read_open_file(os.open(path, _OPEN), param, config)
    except OSError as error:
        raise image_error(param, f"cannot read {path}: {error.strerror}", "image_file_not_found") from None


_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # opening a pipe must not wait for its other end


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


def _scheme(source: Any) -> str:
    """Of a URL that pictures may have, in lower case; empty for anything else."""
    scheme, colon, _ = source[:6].lower().partition(":") if isinstance(source, str) else ("", "", "")
    return scheme if colon and scheme in ("data", "file", "http", "https") else ""


def _num_tokens(width: int, height: int, config: ImageConfig) -> int:
    if not config.dynamic:
        return config.tokens_per_tile
    grid = choose_grid(height, width, tile_size=config.tile_size, min_patches=config.min_patches, max_patches=config.max_patches)
    return grid.num_tiles * config.tokens_per_tile


def _make_fetcher(config: MediaConfig) -> Fetcher:
    from vlserve.fetch import Fetcher

    return Fetcher(config)


async def _all(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first failure ends the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
