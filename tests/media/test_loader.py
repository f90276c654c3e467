"""The pictures of one request: what each way of naming one gives, and what all of them together may cost."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests.vision.test_preprocess import encoded, noise
from vlserve.config import MediaConfig, read_options
from vlserve.errors import ConfigError, EngineError, RequestError
from vlserve.media.loader import PictureLoader
from vlserve.models.architecture import Detail
from vlserve.models.tiles import TilePreprocessor
from vlserve.prompt.chat_messages import ImagePart
from vlserve.vision.image_config import ImageConfig
from vlserve.vision.pixels import Pixels
from vlserve.vision.preprocess import make_tiles

CONFIG = ImageConfig(tile_size=28, tokens_per_tile=4, max_patches=6)
PICTURE = noise(90, 60)
PNG = encoded(Image.fromarray(PICTURE), "PNG")
DATA_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
WANT = make_tiles(Image.fromarray(PICTURE), CONFIG)
PREPROCESSOR = TilePreprocessor(image=CONFIG, tokens=("<img>", "<IMG_CONTEXT>", "</img>"), image_token_id=0)
Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


@contextlib.contextmanager
def loader(**options: Any) -> Iterator[PictureLoader]:
    loader = PictureLoader(MediaConfig(**options))
    yield loader
    loader.close()


def parts(*sources: Any, local: bool = False, detail: Detail = "auto") -> list[ImagePart]:
    return [ImagePart(source=source, param=f"images[{i}]", local=local, detail=detail) for i, source in enumerate(sources)]


def load(*sources: Any, local: bool = False, max_tokens: int | None = None, **options: Any) -> list[Pixels]:
    with loader(**options) as one:
        return asyncio.run(one.load(parts(*sources, local=local), PREPROCESSOR, max_tokens=max_tokens))


def refused(*sources: Any, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        load(*sources, **options)
    return caught.value


@contextlib.asynccontextmanager
async def served(answer: Answer) -> Any:
    """A real server on loopback; gives "http://host:port"."""

    handlers: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
            await answer(path, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield "http://{}:{}".format(*server.sockets[0].getsockname())
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


async def send(writer: asyncio.StreamWriter, body: bytes) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()


async def give_picture(path: str, writer: asyncio.StreamWriter) -> None:
    await send(writer, PNG)


def test_every_way_to_name_a_picture_gives_the_same_tiles(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    percent = "data:image/png," + quote(PNG)
    sources = [Image.fromarray(PICTURE), PICTURE, PNG, bytearray(PNG), memoryview(PNG), DATA_URL, percent]
    sources += [DATA_URL.replace("data:", "DATA:").replace("base64,", "BASE64,"), path, str(path), path.as_uri()]
    tiles = load(*sources, local=True)
    assert [t.digest for t in tiles] == [WANT.digest] * len(sources)
    assert all(np.array_equal(t.data, WANT.data) and t.units == WANT.units for t in tiles)


def test_a_picture_has_options_of_its_own() -> None:
    few, many = ({"max_dynamic_patch": number} for number in (2, 4))
    with loader() as one:
        given = [
            ImagePart(source=DATA_URL, param="i", local=False, options=options, options_param="i") for options in ({}, few, many)
        ]
        tiles = asyncio.run(one.load(given, PREPROCESSOR))
        fewer = asyncio.run(one.load(given, PREPROCESSOR.configured(few)))
    assert [len(t.units) for t in tiles] == [6 + 1, 2 + 1, 4 + 1] and len({t.digest for t in tiles}) == 3
    assert [len(t.units) for t in fewer] == [2 + 1, 2 + 1, 4 + 1], "a picture's own counts before the request's"


@pytest.mark.parametrize("options", [{"max_dynamic_patch": 0}, {"max_dynamic_patch": "6"}, {"max_pixels": 1000}], ids=str)
def test_a_pictures_wrong_options_are_named(options: dict[str, Any]) -> None:
    part = ImagePart(source=DATA_URL, param="x", local=False, options=options, options_param="messages[0].content[1].image_url")
    with loader() as one, pytest.raises(RequestError) as caught:
        asyncio.run(one.load([part], PREPROCESSOR))
    assert caught.value.param == f"messages[0].content[1].image_url.{next(iter(options))}"
    assert caught.value.param in str(caught.value) and "mm_processor_kwargs" not in str(caught.value)


def test_pictures_keep_their_order() -> None:
    pictures = [noise(10 + i, 20, seed=i) for i in range(20)]

    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        index = int(path[1:])
        await asyncio.sleep(0.02 * (20 - index))  # the first arrives last
        await send(writer, encoded(Image.fromarray(pictures[index]), "PNG"))

    async def main() -> None:
        async with served(answer) as base:
            sources = [f"{base}/{i}" if i % 3 else encoded(Image.fromarray(p), "PNG") for i, p in enumerate(pictures)]
            with loader(allow_private_media=True) as one:
                tiles = await one.load(parts(*sources, local=True), PREPROCESSOR)
        assert [t.digest for t in tiles] == [make_tiles(Image.fromarray(p), CONFIG).digest for p in pictures]

    asyncio.run(main())


def test_low_detail_is_one_tile() -> None:
    with loader() as one:
        [tiles] = asyncio.run(one.load(parts(DATA_URL, detail="low"), PREPROCESSOR))
    assert tiles.num_features == 4 and len(tiles.units) == 1


@pytest.mark.parametrize(
    "source,code,message",
    [
        ("data:image/png;base64,@@@", "invalid_base64_image", "base64 is damaged"),
        ("data:image/png;base64,AAAAA", "invalid_base64_image", "base64 is damaged"),
        ("data:image/png;base64", "invalid_image_url", "no comma"),
        ("data:image/png;base64,", "invalid_image", "is empty"),
        ("data:image/png;base64," + base64.b64encode(b"junk").decode(), "invalid_image", "cannot be decoded"),
        ("data:image/png," + "%00" * 400_000, "image_file_too_large", "send the picture as base64"),
        ("/etc/passwd", "invalid_image_url", "data: or http"),
        ("picture.png", "invalid_image_url", "for base64 begin with data:image/png;base64,"),
        (base64.b64encode(PNG).decode(), "invalid_image_url", "for base64 begin with data:image/png;base64,"),
        ("http", "invalid_image_url", "data: or http"),
        ("", "invalid_image_url", "data: or http"),
        ("file:///etc/passwd", "invalid_image_url", "data: or http"),
        ("FILE:///etc/passwd", "invalid_image_url", "data: or http"),
        ("ftp://example.com/x.png", "invalid_image_url", "data: or http"),
        ("http://127.0.0.1:1/x.png", "invalid_image_url", "public internet"),
        (Path("/etc/passwd"), "invalid_image_url", "data: or http"),
        (7, "invalid_image", "a int is no picture"),
        (None, "invalid_image", "a NoneType is no picture"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_bad_sources_name_their_field(source: Any, code: str, message: str) -> None:
    error = refused(PNG, source)
    assert (error.param, error.code) == ("images[1]", code) and message in str(error)


def test_the_number_of_pictures_is_bounded() -> None:
    assert len(load(*[PNG] * 3, limit_images_per_prompt=3)) == 3
    error = refused(*["http://127.0.0.1:1/"] * 4, limit_images_per_prompt=3)
    assert error.param == "messages" and "4 pictures in one request; the limit is 3" in str(error)


def test_the_bytes_of_a_request_are_bounded(tmp_path: Path) -> None:
    padded = PNG + bytes(400_000)
    path = tmp_path / "padded.png"
    path.write_bytes(padded)
    url = "data:image/png;base64," + base64.b64encode(padded).decode()
    assert len(load(url, padded, local=True, max_request_image_mib=1)) == 2
    error = refused(url, padded, path, local=True, max_request_image_mib=1)
    assert (error.param, error.code) == ("images[2]", "image_file_too_large") and "more than 1048576 bytes" in str(error)
    for source in (url * 4, padded * 4):
        assert refused(source, local=True, max_image_mib=1).code in ("image_file_too_large", "invalid_base64_image")
    path.write_bytes(padded * 4)
    assert refused(path, local=True, max_image_mib=1).code == "image_file_too_large"


def test_fetched_and_sent_bytes_share_the_budget() -> None:
    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        await send(writer, PNG + bytes(400_000))

    async def main() -> None:
        async with served(answer) as base:
            with loader(allow_private_media=True, max_request_image_mib=1) as one:
                assert len(await one.load(parts(f"{base}/a", f"{base}/b"), PREPROCESSOR)) == 2
                for sources in ([f"{base}/a"] * 3, [f"{base}/a", f"{base}/b", PNG + bytes(400_000)]):
                    with pytest.raises(RequestError, match="more than 1048576 bytes") as caught:
                        await one.load(parts(*sources, local=True), PREPROCESSOR)
                    assert caught.value.code == "image_file_too_large"

    asyncio.run(main())


def test_the_pixels_of_a_request_are_bounded_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(load(PNG, PNG, max_request_image_pixels=2 * 90 * 60)) == 2
    monkeypatch.setattr("vlserve.media.loader.decode_image", None)
    error = refused(PNG, PNG, PNG, max_request_image_pixels=2 * 90 * 60)
    assert (error.param, error.code) == ("images[2]", "image_too_large") and "16200 pixels, the limit is 10800" in str(error)


def test_tokens_that_cannot_fit_are_refused_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(load(PNG, PNG, max_tokens=2 * WANT.num_features)) == 2
    monkeypatch.setattr("vlserve.media.loader.decode_image", None)
    error = refused(PNG, PNG, max_tokens=2 * WANT.num_features - 1)
    assert error.code == "context_length_exceeded" and f"{2 * WANT.num_features} tokens" in str(error)


def test_a_turned_picture_is_never_counted_too_high() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for size in ((90, 60), (60, 90), (28, 200), (200, 28), (57, 113)):
        data = encoded(Image.fromarray(noise(*size)), "JPEG", exif=exif)
        [tiles] = load(data)
        assert load(data, max_tokens=tiles.num_features)[0].digest == tiles.digest


def test_a_server_that_drips_does_not_hold_a_request_for_ever() -> None:
    async def drip(path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/picture":
            return await send(writer, PNG)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def main() -> None:
        async with served(drip) as base:
            with loader(allow_private_media=True, media_timeout_s=2) as one:  # more than the picture takes
                with pytest.raises(RequestError, match=r"did not arrive within 2 s") as caught:
                    await one.load(parts(PNG, f"{base}/picture", f"{base}/drip", f"{base}/drip", local=True), PREPROCESSOR)
                assert (caught.value.param, caught.value.code) == ("images[2]", "failed_to_download_image")

    asyncio.run(main())


def test_redirects_share_the_time() -> None:
    async def wander(path: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        writer.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /next\r\n\r\n")

    async def main() -> None:
        async with served(wander) as base:
            with loader(allow_private_media=True, media_timeout_s=0.5) as one, pytest.raises(RequestError, match="within"):
                await one.load(parts(f"{base}/"), PREPROCESSOR)

    asyncio.run(main())


def test_a_slow_request_holds_up_no_other() -> None:
    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/slow":
            await release.wait()
        await send(writer, PNG)

    async def main() -> None:
        nonlocal release
        release = asyncio.Event()
        async with served(answer) as base:
            with loader(allow_private_media=True, media_workers=1) as one:
                slow = [asyncio.ensure_future(one.load(parts(*[f"{base}/slow"] * 20), PREPROCESSOR)) for _ in range(3)]
                await asyncio.sleep(0.1)
                [tiles] = await one.load(parts(f"{base}/fast"), PREPROCESSOR)
                assert tiles.digest == WANT.digest and not any(task.done() for task in slow)
                release.set()
                assert [len(tiles) for tiles in await asyncio.gather(*slow)] == [20] * 3

    release: asyncio.Event
    asyncio.run(main())


def test_what_all_requests_fetch_is_bounded_and_given_back() -> None:
    async def answer(path: str, writer: asyncio.StreamWriter) -> None:
        body = PNG + bytes(600_000)
        if path != "/slow":
            return await send(writer, body)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:-1])
        await writer.drain()
        sent.set()
        await release.wait()
        writer.write(body[-1:])

    async def main() -> None:
        nonlocal release, sent
        release, sent = asyncio.Event(), asyncio.Event()
        async with served(answer) as base:
            with loader(allow_private_media=True, max_fetched_mib=1) as one:
                slow = asyncio.ensure_future(one.load(parts(f"{base}/slow"), PREPROCESSOR))
                await sent.wait()
                while True:  # until the first one's bytes are counted
                    try:
                        await one.load(parts(f"{base}/fast"), PREPROCESSOR)
                    except EngineError as error:
                        assert "try again" in str(error)
                        break
                release.set()
                assert len(await slow) == 1
                for _ in range(5):  # also after failures
                    assert len(await one.load(parts(f"{base}/fast"), PREPROCESSOR)) == 1
                    with pytest.raises(RequestError):
                        await one.load(parts(f"{base}/fast", "data:,junk"), PREPROCESSOR)

    release: asyncio.Event
    sent: asyncio.Event
    asyncio.run(main())


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlserve.media.loader.LARGE_PIXELS", 90 * 60 - 1)
    running, most, lock = 0, 0, threading.Lock()
    small_began, decode = threading.Event(), PictureLoader._prepare

    def prepare(self: PictureLoader, source: Any, part: ImagePart, preprocessor: Any, clock: Any) -> Pixels:
        nonlocal running, most
        if len(source) == len(SMALL):
            small_began.set()
            return decode(self, source, part, preprocessor, clock)
        with lock:
            running += 1
            most = max(most, running)
        assert small_began.wait(10), "small pictures pass while a large one is decoded"
        tiles = decode(self, source, part, preprocessor, clock)
        with lock:
            running -= 1
        return tiles

    monkeypatch.setattr(PictureLoader, "_prepare", prepare)
    assert len(load(PNG, PNG, PNG, SMALL, local=True, media_workers=4)) == 4
    assert most == 1


SMALL = encoded(Image.fromarray(noise(9, 5)), "PNG")


def test_a_request_that_is_cancelled_leaves_nothing_behind() -> None:
    async def never(path: str, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await asyncio.sleep(3600)

    async def main() -> None:
        nonlocal connected
        connected = asyncio.Event()
        async with served(never) as base:
            with loader(allow_private_media=True) as one:
                task = asyncio.ensure_future(one.load(parts(f"{base}/"), PREPROCESSOR))
                await connected.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert len(await one.load(parts(DATA_URL), PREPROCESSOR)) == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}

    connected: asyncio.Event
    asyncio.run(main())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(the folder that is given, one that is not), with a picture each."""
    given, outside = tmp_path / "given", tmp_path / "given-not"
    for folder in (given, outside):
        (folder / "below").mkdir(parents=True)
        (folder / "picture.png").write_bytes(PNG)
        (folder / "below" / "ä b%20c.png").write_bytes(PNG)
    return given, outside


def test_files_below_the_folder_are_given(folders: tuple[Path, Path]) -> None:
    given, _ = folders
    (given / "inner").symlink_to(given / "below")
    (given / "link.png").symlink_to(given / "picture.png")
    (given.parent / "way").symlink_to(given)
    urls = [
        (given / "picture.png").as_uri(),
        f"file://localhost{given}/picture.png",
        f"FILE://{given}/picture.png",
        (given / "below" / "ä b%20c.png").as_uri(),
        f"file://{given}/below/../picture.png",
        f"file://{given}/%70icture%2Epng",
        f"file://{given}/inner/%C3%A4%20b%2520c.png",
        f"file://{given}/link.png",
    ]
    for root in (given, given.parent / "way", given / "below" / ".."):
        assert [t.digest for t in load(*urls, allowed_local_media_path=str(root))] == [WANT.digest] * len(urls)


def test_no_other_file_is_given(folders: tuple[Path, Path]) -> None:
    given, outside = folders
    (given / "escape").symlink_to(outside)
    (given / "escape.png").symlink_to(outside / "picture.png")
    (given / "descriptors").symlink_to("/proc/self/fd")
    (given / "loop").symlink_to(given / "loop")
    os.mkfifo(given / "pipe.png")
    (given / "locked.png").write_bytes(PNG)
    (given / "empty.png").write_bytes(b"")
    missing = [
        f"file://{outside}/picture.png",
        f"file://{given}/../given-not/picture.png",
        f"file://{given}/%2e%2e/given-not/picture.png",
        f"file://{given}/..%2fgiven-not%2fpicture.png",
        f"file://{given}/escape/picture.png",
        f"file://{given}/escape.png",
        f"file://{given}/descriptors/0",
        f"file://{given}/loop",
        f"file://{given}/pipe.png",
        f"file://{given}/below",
        f"file://{given}",
        f"file://{given}/",
        f"file://{given}/nothing.png",
        f"file://{given}/picture.png/more",
        f"file://{given}/" + "x" * 5000,
        "file:///etc/passwd",
        "file:///proc/self/environ",
        f"file:///proc/self/root{outside}/picture.png",
        f"file:///proc/self/cwd/{outside}/picture.png",
        "file:///dev/zero",
        f"file:{outside}/picture.png",
    ]
    texts = set()
    for url in missing:
        error = refused(url, allowed_local_media_path=str(given))
        assert (error.param, error.code) == ("images[0]", "image_file_not_found"), url
        texts.add(str(error))
    assert texts == {"images[0]: no such picture in the folder that this server gives files from"}, "all look the same"
    malformed = [
        f"file://host{given}/picture.png",
        f"file://127.0.0.1{given}/picture.png",
        f"file://user@localhost{given}/picture.png",
        f"file://{given}/picture.png?x=1",
        f"file://{given}/picture.png#x",
        f"file://{given}/picture.png%00.jpg",
        "file:picture.png",
        "file://picture.png",
        "file:",
        "file://[/picture.png",
    ]
    for url in malformed:
        error = refused(url, allowed_local_media_path=str(given))
        assert (error.param, error.code) == ("images[0]", "invalid_image_url"), url
    assert "is empty" in str(refused(f"file://{given}/empty.png", allowed_local_media_path=str(given)))


def test_a_folder_that_is_swapped_for_a_link_gives_nothing(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the check and the opening."""
    given, outside = folders
    resolve = os.path.realpath

    def swap(path: Any, *, strict: bool = False) -> str:
        found: str = resolve(path, strict=strict)
        if path.endswith("picture.png") and (given / "below").is_dir() and not (given / "below").is_symlink():
            (given / "below").rename(given / "was-below")
            (given / "below").symlink_to(outside)
        return found

    (given / "below" / "picture.png").write_bytes(PNG)
    monkeypatch.setattr("os.path.realpath", swap)
    url = f"file://{given}/below/picture.png"
    assert refused(url, allowed_local_media_path=str(given)).code == "image_file_not_found"
    assert (given / "below").is_symlink(), "the swap took place"


def test_python_may_name_any_path_and_hears_why_not(tmp_path: Path) -> None:
    error = refused(tmp_path / "nothing.png", local=True)
    assert error.param == "images[0]" and "cannot read" in str(error) and "nothing.png" in str(error)
    for path in ("~no-such-user/x.png", "nul\0.png"):
        assert "cannot read" in str(refused(path, local=True))
    os.mkfifo(tmp_path / "pipe")
    for folder in (tmp_path, tmp_path / "pipe"):
        assert "not a regular file" in str(refused(folder, local=True))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"max_image_pixels": 0}, "max_image_pixels is 0"),
        ({"max_image_pixels": 10**9}, "the decoders go up to"),
        ({"limit_images_per_prompt": True}, "limit_images_per_prompt is True"),
        ({"media_workers": 0}, "media_workers is 0"),
        ({"media_timeout_s": 0}, "media_timeout_s is 0"),
        ({"media_timeout_s": float("nan")}, "media_timeout_s is nan"),
        ({"allow_private_media": "yes"}, "allow_private_media is 'yes'"),
        ({"allowed_media_hosts": ["http://example.com"]}, "expected a host name"),
        ({"allowed_media_hosts": ["*"]}, "expected a host name"),
        ({"allowed_media_hosts": ["ex*mple.com"]}, "expected a host name"),
        ({"denied_media_hosts": ["bücher.example"]}, "xn-- form"),
        ({"denied_media_hosts": [""]}, "expected a host name"),
        ({"denied_media_hosts": [7]}, "expected a host name"),
        ({"allowed_local_media_path": "/no/such/folder"}, "expected an existing folder"),
        ({"max_pictures": 5}, "unknown option 'max_pictures'"),
    ],
    ids=str,
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        read_options({"model": "demo", **options})


def test_options_go_where_they_belong() -> None:
    engine, media = read_options({"model": "x", "max_num_seqs": 3, "allowed_media_hosts": "Example.COM", "media_workers": 2})
    assert (engine.model, engine.max_num_seqs) == ("x", 3)
    assert (media.allowed_media_hosts, media.media_workers) == (("example.com",), 2)


def test_arrays_and_images_count_as_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (PICTURE, Image.fromarray(PICTURE)):
        assert refused(source, local=True, max_image_pixels=5000).code == "image_too_large"
    assert np.array_equal(PICTURE, noise(90, 60)), "the caller's array is as it was"
