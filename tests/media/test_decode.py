"""A picture gives the pixels a person sees; bombs and damaged bytes are refused in our words, before memory is spent."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from tests.vision.test_preprocess import encoded, noise, odd_pictures
from vlserve.config import MediaConfig
from vlserve.errors import RequestError
from vlserve.media.decode import FORMATS, decode_image, measure_image

PICTURE = noise(9, 5)
PNG = encoded(Image.fromarray(PICTURE), "PNG")


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("JPEG", "AVIF")])
def test_every_lossless_format_gives_its_pixels(kind: str) -> None:
    picture = Image.fromarray(PICTURE).quantize(8).convert("RGB")  # few colours, so that GIF holds them too
    data = encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = decode_image(data, param="i")
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(picture))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind in ("JPEG", "AVIF")])
def test_lossy_formats_come_close(kind: str) -> None:
    smooth = Image.linear_gradient("L").convert("RGB")
    image = decode_image(encoded(smooth, kind, quality=95), param="i")
    assert np.abs(np.asarray(image).astype(int) - np.asarray(smooth).astype(int)).max() < 12


def test_images_arrays_and_bytes_give_the_same_pixels() -> None:
    for source in (Image.fromarray(PICTURE), PICTURE, PNG):
        assert np.array_equal(np.asarray(decode_image(source, param="i")), PICTURE)
    grey = decode_image(PICTURE[:, :, 0], param="i")
    assert np.array_equal(np.asarray(grey), np.repeat(PICTURE[:, :, :1], 3, axis=2))


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    for kind in ("PNG", "WEBP", "TIFF"):
        assert decode_image(encoded(clear, kind, **{"lossless": True} if kind == "WEBP" else {}), param="i").getpixel((0, 0)) == (
            255,
            255,
            255,
        )
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert decode_image(encoded(palette, "PNG", transparency=0), param="i").getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("LA", (1, 1), (0, 0)), "PNG"), param="i").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_turn_of_exif_is_undone(kind: str, turn: int) -> None:
    seen = Image.fromarray(np.kron(np.array([[0, 80, 160], [255, 40, 120]], dtype=np.uint8), np.ones((16, 16), dtype=np.uint8)))
    turns = Image.Transpose
    methods = {2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE}
    methods |= {6: turns.ROTATE_90, 7: turns.TRANSVERSE, 8: turns.ROTATE_270}
    stored = seen.transpose(methods[turn]) if turn in methods else seen
    exif = Image.Exif()
    exif[0x0112] = turn
    image = decode_image(encoded(stored.convert("RGB"), kind, exif=exif, quality=100), param="i")
    assert image.size == seen.size
    assert np.abs(np.asarray(image)[:, :, 0].astype(int) - np.asarray(seen).astype(int)).max() < 24


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0junk", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 20]
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    for kind in ("JPEG", "WEBP", "PNG"):
        assert decode_image(encoded(Image.fromarray(noise(90, 50)), kind, exif=exif), param="i").size == (90, 50)


def test_a_picture_of_the_caller_is_not_changed() -> None:
    mine = Image.open(io.BytesIO(odd_pictures()["exif"]))
    size = mine.size
    assert decode_image(mine, param="i").size == size[::-1] and mine.size == size


def test_sixteen_bits_keep_their_brightness() -> None:
    grey = np.array([[0, 128 * 256, 65535]], dtype=np.uint16)
    for data in (encoded(Image.fromarray(grey), "PNG"), encoded(Image.fromarray(grey), "TIFF")):
        image = decode_image(data, param="i")
        assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]
    deep = Image.fromarray(np.array([[-5, 128 * 256, 70000]], dtype=np.int32))
    assert [decode_image(deep, param="i").getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes) -> bytes:
    """Little-endian, with the data at the end; -1 as a value stands for the data's place. Types as in TIFF 6."""
    start = 8 + 2 + 12 * len(tags) + 4
    rows = [struct.pack("<HHLL", tag, kind, count, start if v < 0 else v) for tag, (kind, count, v) in sorted(tags.items())]
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + b"".join(rows) + struct.pack("<L", 0) + data


RAMP = np.array([[0, 51, 102, 255]])
LONG, SHORT = 4, 3


def samples_tiff(samples: np.ndarray, *, sign: int = 1, white: int = 1) -> bytes:
    """One row of samples of 16 or 32 bits. sign: 1 is whole numbers, 2 signed ones, 3 real ones; white: 0 or 1 is black."""
    tags = {256: (LONG, 1, samples.shape[1]), 257: (LONG, 1, 1), 258: (SHORT, 1, samples.itemsize * 8), 259: (SHORT, 1, 1)}
    tags |= {262: (SHORT, 1, white), 273: (LONG, 1, -1), 277: (SHORT, 1, 1), 278: (LONG, 1, 1), 279: (LONG, 1, samples.nbytes)}
    return tiff(tags | {339: (SHORT, 1, sign)}, samples.tobytes())


RANGES = {
    "real 0..1": (samples_tiff((RAMP / 255).astype(np.float32), sign=3), RAMP),
    "real 0..255": (samples_tiff(RAMP.astype(np.float32), sign=3), RAMP),
    "real 0..65535": (samples_tiff((RAMP * 257).astype(np.float32), sign=3), RAMP),
    "real, white is 0": (samples_tiff((RAMP / 255).astype(np.float32), sign=3, white=0), 255 - RAMP),
    "real, a little beyond": (samples_tiff(np.array([[-0.01, 0.2, 0.4, 1.02]], np.float32), sign=3), RAMP),
    "real, as far as they go": (
        samples_tiff(np.array([[-3.4e38, -3.4e38, 3.4e38, 3.4e38]], np.float32), sign=3),
        [[0, 0, 255, 255]],
    ),
    "real -1..1": (samples_tiff((RAMP / 127.5 - 1).astype(np.float32), sign=3), RAMP),
    "not all numbers": (samples_tiff(np.array([[np.nan, 0.2, -np.inf, np.inf]], np.float32), sign=3), [[0, 51, 0, 255]]),
    "no numbers": (samples_tiff(np.full((1, 4), np.nan, np.float32), sign=3), [[0] * 4]),
    "all the same": (samples_tiff(np.full((1, 4), -7, np.float32), sign=3), [[0] * 4]),
    "int32 0..255": (samples_tiff(RAMP.astype(np.int32), sign=2), RAMP),
    "int32 0..65535": (samples_tiff((RAMP * 257).astype(np.int32), sign=2), RAMP),
    "int32 in full": (samples_tiff((RAMP * 16843009 - 2**31).astype(np.int32), sign=2), RAMP),
    "uint32 in full": (samples_tiff((RAMP * 16843009).astype(np.uint32)), RAMP),
    "int16 0..255": (samples_tiff(RAMP.astype(np.int16), sign=2), RAMP),
    "int16 of a scanner": (samples_tiff((RAMP * 15 - 1024).astype(np.int16), sign=2), RAMP),
    "uint16": (samples_tiff((RAMP * 257).astype(np.uint16)), RAMP),
    "uint16, white is 0": (samples_tiff((RAMP * 257).astype(np.uint16), white=0), 255 - RAMP),
    "PIL's I": (Image.fromarray(RAMP.astype(np.int32)), RAMP),
    "PIL's F": (Image.fromarray((RAMP / 255).astype(np.float32)), RAMP),
    "bilevel": (encoded(Image.fromarray(RAMP > 100), "TIFF"), [[0, 0, 255, 255]]),
    "grey with clear parts": (Image.fromarray(np.array([[[51, 255], [51, 0]]], np.uint8), "LA"), [[51, 255]]),
    "and multiplied": (Image.fromarray(np.array([[[51, 255], [51, 0]]], np.uint8), "LA").convert("La"), [[51, 255]]),
    "a clear value of 16 bits": (
        encoded(Image.fromarray((RAMP * 257).astype(np.uint16)), "PNG", transparency=0),
        [[255, 51, 102, 255]],
    ),
}


@pytest.mark.parametrize("name", RANGES)
def test_samples_of_any_range_are_seen(name: str) -> None:
    source, want = RANGES[name]
    got = np.asarray(decode_image(source, param="i"))
    assert got.shape == (1, len(want[0]), 3)
    assert np.array_equal(got, np.repeat(np.asarray(want)[:, :, None], 3, axis=2)), got[:, :, 0]


def test_twelve_bits_keep_their_brightness() -> None:
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00])  # 0, 4095, 2048, 0
    tags = {256: (LONG, 1, 4), 257: (LONG, 1, 1), 258: (SHORT, 1, 12), 259: (SHORT, 1, 1), 262: (SHORT, 1, 1)}
    tags |= {273: (LONG, 1, -1), 277: (SHORT, 1, 1), 278: (LONG, 1, 1), 279: (LONG, 1, 6)}
    assert np.asarray(decode_image(tiff(tags, packed), param="i"))[0, :, 0].tolist() == [0, 255, 128, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 7)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
def test_odd_sizes(kind: str, size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, (10, 200, 30)), kind)
    assert measure_image(data, param="i", config=MediaConfig()) == size
    assert decode_image(data, param="i").size == size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = decode_image(Image.new(mode, (4, 3)), param="i")
    assert image.mode == "RGB" and image.size == (4, 3)


def gif_of(frames: int) -> bytes:
    """A real GIF whose first frame is red and whose others are blue, as many as wanted."""
    buffer = io.BytesIO()
    two = [Image.new("P", (4, 4), index) for index in (0, 1)]
    for image in two:
        image.putpalette([255, 0, 0, 0, 0, 255])
    two[0].save(buffer, "GIF", save_all=True, append_images=two[1:], duration=50)
    data = buffer.getvalue()
    second = data.rindex(b"\x21\xf9\x04")  # from its graphic control extension to the trailer
    return data[:second] + data[second:-1] * (frames - 1) + b";"


@pytest.mark.parametrize("frames", [2, 10_000])
def test_an_animation_gives_its_first_frame(frames: int) -> None:
    assert decode_image(gif_of(frames), param="i").getpixel((0, 0)) == (255, 0, 0)  # type: ignore[comparison-overlap]


def test_what_follows_a_picture_is_ignored() -> None:
    for rest in (b"PK\x03\x04" + b"x" * 50, b"%PDF-1.7 ...", b"<html><script>alert(1)</script></html>"):
        assert np.array_equal(np.asarray(decode_image(PNG + rest, param="i")), PICTURE)


@pytest.mark.parametrize("kind", FORMATS)
def test_eight_megabytes_behind_a_picture_are_ignored(kind: str) -> None:
    """As phones put films and further pictures behind a JPEG; they hold bytes that would be scans' beginnings."""
    data = encoded(Image.fromarray(noise(90, 50)), kind)
    film = noise(2**20, 8, 1).tobytes()
    assert film.count(b"\xff\xda") > 100
    assert np.array_equal(np.asarray(decode_image(data + film, param="i")), np.asarray(decode_image(data, param="i")))


def test_many_pictures_in_one_file_and_previews_are_no_scans() -> None:
    picture, preview = Image.fromarray(noise(90, 50)), encoded(Image.fromarray(noise(40, 30)), "JPEG", progressive=True)
    want = np.asarray(decode_image(encoded(picture, "JPEG"), param="i"))
    mpo = encoded(picture, "MPO", save_all=True, append_images=[picture.rotate(90, expand=True)] * 120)
    assert mpo.count(b"\xff\xda") > 100
    previews = b"".join(b"\xff\xe5" + struct.pack(">H", 2 + len(preview)) + preview for _ in range(20))
    plain = encoded(picture, "JPEG")
    for data in (mpo, plain[:2] + previews + plain[2:]):
        assert np.array_equal(np.asarray(decode_image(data, param="i")), want)


JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")
BAD: dict[str, tuple[object, str]] = {
    "nothing": (b"", "is empty"),
    "text": (b"not a picture", "cannot be decoded"),
    "half a png": (PNG[: len(PNG) // 2], "cannot be decoded"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "cannot be decoded"),
    "a jpeg without its end": (JPEG[:-200], "cannot be decoded"),
    "half a gif": (gif_of(2)[:40], "cannot be decoded"),
    "half a webp": (encoded(Image.fromarray(noise(64, 64)), "WEBP")[:300], "cannot be decoded"),
    "half a tiff": (encoded(Image.fromarray(noise(64, 64)), "TIFF")[:300], "cannot be decoded"),
    "half a bmp": (encoded(Image.fromarray(noise(64, 64)), "BMP")[:300], "cannot be decoded"),
    "png and then zip": (PNG[:33] + b"PK\x03\x04" + b"x" * 100, "cannot be decoded"),
    "png and then html": (PNG[:8] + b"<html></html>", "cannot be decoded"),
    "a flipped bit": (PNG[:45] + bytes([PNG[45] ^ 16]) + PNG[46:], "cannot be decoded"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
    "pdf": (b"%PDF-1.7\n", "cannot be decoded"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "cannot be decoded"),
    "ico": (encoded(Image.fromarray(noise(32, 32)), "ICO"), "cannot be decoded"),
    "ppm": (encoded(Image.fromarray(noise(32, 32)), "PPM"), "cannot be decoded"),
    "tga": (encoded(Image.fromarray(noise(32, 32)), "TGA"), "cannot be decoded"),
    "floats": (np.zeros((3, 3), dtype=np.float32), "array of uint8"),
    "an empty array": (np.zeros((0, 3, 3), dtype=np.uint8), "is empty"),
    "five channels": (np.zeros((3, 3, 5), dtype=np.uint8), "array of uint8"),
    "an empty image": (Image.new("RGB", (0, 5)), "is empty"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_bad_pictures_are_refused(name: str) -> None:
    source, message = BAD[name]
    with pytest.raises(RequestError, match=message) as caught:
        decode_image(source, param="messages[0].content[1]")  # type: ignore[arg-type]
    assert caught.value.param == "messages[0].content[1]" and caught.value.code == "invalid_image"
    assert caught.value.__cause__ is None and "PIL" not in str(caught.value) and "object at" not in str(caught.value)


def test_bounds_are_the_configurations() -> None:
    config = MediaConfig(max_image_pixels=44)
    for source in (PNG, PICTURE, Image.fromarray(PICTURE)):
        with pytest.raises(RequestError, match="9x5 pixels, the limit is 44") as caught:
            decode_image(source, param="i", config=config)
        assert caught.value.code == "image_too_large"
        assert decode_image(source, param="i", config=MediaConfig(max_image_pixels=45)).size == (9, 5)
    big = PNG + bytes(2**20)
    with pytest.raises(RequestError, match="the limit is 1048576") as caught:
        decode_image(big, param="i", config=MediaConfig(max_image_mib=1))
    assert caught.value.code == "image_file_too_large"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def tiled_tiff(size: int, tile: int) -> bytes:
    """A picture of size x size in one deflated tile of tile x tile black pixels."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(tile * 64)) for _ in range(tile // 64)) + packer.flush()
    short, long = 3, 4
    tags = {256: (long, 1, size), 257: (long, 1, size), 258: (short, 1, 8), 259: (short, 1, 8), 262: (short, 1, 1)}
    tags |= {277: (short, 1, 1), 322: (long, 1, tile), 323: (long, 1, tile)}
    return tiff(tags | {324: (long, 1, -1), 325: (long, 1, len(packed))}, packed)


def odd_tile(kind: int, count: int, value: int) -> bytes:
    """A plain TIFF that says a tile's width in an odd way."""
    long = 4
    tags = {256: (long, 1, 4), 257: (long, 1, 4), 258: (3, 1, 8), 259: (3, 1, 8), 262: (3, 1, 1), 277: (3, 1, 1)}
    tags |= {322: (kind, count, value), 323: (long, 1, 2**30), 324: (long, 1, -1), 325: (long, 1, 8)}
    return tiff(tags, bytes(64))


def overlapping_tags(number: int, size: int) -> bytes:
    """EXIF in which many tags claim the same bytes."""
    return tiff({1000 + i: (7, size, -1) for i in range(number)}, bytes(size))


def jpeg_of_scans(number: int) -> bytes:
    data = encoded(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * number + data[-2:]


def jpeg_of_hidden_scans(number: int) -> bytes:
    """With a comment that looks like the end, and scans that begin with more than one 0xff."""
    data = jpeg_of_scans(number).replace(b"\xff\xda", b"\xff\xff\xff\xda")
    return data[:2] + b"\xff\xfe\x00\x04\xff\xd9" + data[2:]


def jpeg_with_size(width: int, height: int) -> bytes:
    place = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:place] + struct.pack(">HH", height, width) + JPEG[place + 4 :]


def webp_with_canvas(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(buffer.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:30] = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return bytes(data)


GIF_FRAME = b"\x2c\0\0\0\0" + struct.pack("<HH", 60000, 60000) + b"\0\x02\x02\x4c\x01\0;"
BOMBS: dict[str, Callable[[], bytes]] = {
    "30,000 x 30,000 png": lambda: png(30000, 30000, chunk(b"IDAT", zlib.compress(bytes(30001))), bits=1, colour=0),
    "a png of 2^31": lambda: png(2**31 - 1, 2**31 - 1),
    "a png that could be": lambda: png(9000, 9000, chunk(b"IDAT", zlib.compress(bytes(9001)))),
    "a png of no pixels": lambda: png(0, 0, chunk(b"IDAT", zlib.compress(b""))),
    "text in a png": lambda: png(1, 1, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 10**8)))),
    "a profile in a png": lambda: png(1, 1, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2 * 10**8)))),
    "much text in a png": lambda: png(1, 1, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))) * 500),
    "exif in a png": lambda: png(1, 1, chunk(b"eXIf", overlapping_tags(500, 2**20)), chunk(b"IDAT", zlib.compress(bytes(4)))),
    "a gif with a large screen": lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0" + GIF_FRAME,
    "a gif with a large frame": lambda: b"GIF89a" + struct.pack("<HH", 1, 1) + b"\0\0\0" + GIF_FRAME,
    "a tiff of 60,000": lambda: tiled_tiff(60000, 64),
    "a small tiff with a large tile": lambda: tiled_tiff(16, 20480),
    "a small tiff whose tile has less than a picture's limit": lambda: tiled_tiff(16, 7680),
    "a tile as wide as a text": lambda: odd_tile(2, 4, 0x41414141),
    "a tile as wide as a fraction": lambda: odd_tile(5, 1, -1),
    "a tile as wide as a float": lambda: odd_tile(11, 1, 0x7F800000),
    "a tile of two widths": lambda: odd_tile(3, 2, 2**31 - 1),
    "a tiff with overlapping tags": lambda: overlapping_tags(500, 2**20),
    "a bmp of 30,000": lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0),
    "a jpeg of 65,000": lambda: jpeg_with_size(65000, 65000),
    "a jpeg of a thousand scans": lambda: jpeg_of_scans(1000),
    "a jpeg of hidden scans": lambda: jpeg_of_hidden_scans(1000),
    "a jpeg of a million segments": lambda: JPEG[:2] + b"\xff\xfe\0\2" * 10**6 + JPEG[2:],
    "a webp with a large canvas": lambda: webp_with_canvas(16000, 11000),
    "a webp with a huge canvas": lambda: webp_with_canvas(2**24, 255),
}
MEASURE = """
import json, pathlib, sys, warnings
from vlserve.config import MediaConfig
from vlserve.errors import RequestError
from vlserve.media.decode import decode_image

def memory(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    data = path.read_bytes()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again
    before = memory("VmRSS")
    try:
        image = decode_image(data, param="images[0]")
        outcome, message = "decoded", f"{image.size}"
    except RequestError as error:
        assert error.param == "images[0]"
        outcome, message = error.code, str(error)
    image = None
    print(json.dumps([path.name, outcome, message, memory("VmHWM") - before]), flush=True)
"""


def peaks(folder: Path) -> dict[str, tuple[str, str, float]]:
    """(outcome, message, MiB at the peak) of decoding each file in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing is printed about somebody's picture"
    return {name: (outcome, message, peak) for name, outcome, message, peak in map(json.loads, done.stdout.splitlines())}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_cost_no_memory(tmp_path: Path) -> None:
    for name, make in BOMBS.items():
        data = make()
        assert len(data) < 2**22, f"{name} is a bomb: small"
        (tmp_path / name).write_bytes(data)
    found = peaks(tmp_path)
    assert set(found) == set(BOMBS)
    for name, (outcome, message, peak) in found.items():
        assert peak < 150, f"{name}: {peak} MiB"
        if name == "exif in a png":  # a picture like any other, whose tags do not matter
            assert outcome == "decoded"
        else:
            assert outcome in ("invalid_image", "image_too_large") and message.startswith("images[0]: the picture"), name


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_pixel_costs_at_most_thirty_bytes(tmp_path: Path) -> None:
    side = 3000
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.radial_gradient("L").resize((side, side))
    colour = Image.merge("RGB", (grey, grey, grey))
    clear = Image.merge("RGBA", (grey, grey, grey, grey))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    files = {
        "turned.jpg": encoded(colour, "JPEG", exif=exif),
        "progressive.jpg": encoded(colour, "JPEG", progressive=True, subsampling=0, exif=exif),
        "clear.png": encoded(clear, "PNG", compress_level=1, exif=exif),
        "deep.png": encoded(deep, "PNG", compress_level=1),
        "clear.webp": encoded(clear, "WEBP", method=0, exif=exif),
        "print.tiff": encoded(colour.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "float.tiff": encoded(grey.convert("F"), "TIFF", compression="tiff_lzw"),
    }
    if features.check("avif"):
        files["clear.avif"] = encoded(clear, "AVIF", speed=10)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name, (outcome, _, peak) in peaks(tmp_path).items():
        assert outcome == "decoded" and peak * 2**20 < 30 * side * side, f"{name}: {peak * 2**20 / side**2:.1f} bytes a pixel"
