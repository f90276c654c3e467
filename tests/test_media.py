"""Every way to name a picture gives the pixels a person sees; everything else is refused in our words."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.vision.test_preprocess import encoded, noise, odd_pictures
from vlserve import media
from vlserve.errors import RequestError
from vlserve.media import decode_image, fetch, is_public

PICTURE = noise(9, 5)
PNG = encoded(Image.fromarray(PICTURE), "PNG")


def test_all_sources_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    for source in (Image.fromarray(PICTURE), PICTURE, PNG, bytearray(PNG), url, path, str(path)):
        image = decode_image(source, param="image", local=True)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), PICTURE), type(source)


def test_transparency_becomes_white_and_exif_turns() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert decode_image(encoded(clear, "PNG"), param="i").getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(odd_pictures()["exif"], param="i").size == (50, 90)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert decode_image(encoded(palette, "PNG", transparency=0), param="i").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_brightness() -> None:
    grey = np.array([[0, 128 * 256, 65535]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(grey), "PNG"), param="i")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]


def test_an_animation_gives_its_first_frame() -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(buffer.getvalue(), param="i").getpixel((0, 0)) == (255, 0, 0)  # type: ignore[comparison-overlap]


BAD: list[tuple[object, str]] = [
    (b"", "cannot be decoded"),
    (b"not a picture", "cannot be decoded"),
    (PNG[: len(PNG) // 2], "cannot be decoded"),
    (b"%!PS-Adobe-3.0 EPSF-3.0", "cannot be decoded"),
    ("data:image/png;base64,@@@", "base64 is damaged"),
    ("data:image/png;base64", "no comma"),
    ("/etc/passwd", "data: or http"),
    ("file:///etc/passwd", "data: or http"),
    (np.zeros((3, 3), dtype=np.float32), "array of uint8"),
    (np.zeros((0, 3, 3), dtype=np.uint8), "is empty"),
    (7, "a int is no picture"),
]


@pytest.mark.parametrize("source,message", BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_sources_are_refused(source: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        decode_image(source, param="messages[0].content[1]")
    assert caught.value.param == "messages[0].content[1]"


def test_bounds_on_pixels_and_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bomb = encoded(Image.new("1", (20000, 20000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(RequestError, match="pixels"):
        decode_image(bomb, param="i")
    monkeypatch.setattr(media, "MAX_BYTES", 10)
    (tmp_path / "big.png").write_bytes(PNG)
    for source in (PNG, tmp_path / "big.png"):
        with pytest.raises(RequestError, match="the limit is 10"):
            decode_image(source, param="i", local=True)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "192.168.1.1",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
    ]
    + ["::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "fe80::1%eth0"],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_public_addresses() -> None:
    assert is_public("8.8.8.8") and is_public("2606:4700::1111") and is_public("::ffff:8.8.8.8")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x",
        "http://localhost/x",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
    ]
    + [
        "http://0/",
        "http://127.1/",
        "https://user:pass@127.0.0.1/",
        "http://8.8.8.8\\@127.0.0.1/",
        "http:///x",
        "ftp://8.8.8.8/x",
    ],
)
def test_urls_that_lead_inside_are_refused_before_any_connection(url: str) -> None:
    with pytest.raises(RequestError, match="public internet|data: or http|not known"):
        asyncio.run(fetch(url, param="i"))


def test_every_redirect_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that the check lets through leads to one that it must not."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        hosts.append(next(line for line in request.splitlines() if line.lower().startswith("host:")))
        if request.startswith("GET /picture"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG)
        else:
            location = b"/picture" if request.startswith("GET /good") else b"http://169.254.169.254/latest"
            writer.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n")
        await writer.drain()
        writer.close()

    hosts: list[str] = []
    public = media.is_public
    monkeypatch.setattr(media, "is_public", lambda address: address == "127.0.0.1" or public(address))

    async def check() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            assert (
                await fetch(f"http://localhost.localdomain:{port}/good".replace("localhost.localdomain", "localhost"), param="i")
                == PNG
            )
            with pytest.raises(RequestError, match="not on the public internet"):
                await fetch(f"http://localhost:{port}/bad", param="i")
        assert hosts[0] == f"Host: localhost:{port}", "the name stays in the header, the address in the connection"

    asyncio.run(check())
