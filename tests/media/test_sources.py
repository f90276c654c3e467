"""data: URLs as encoders write them give their bytes, as the WHATWG's Fetch standard has it; the others are refused."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest

from vlserve.config import MediaConfig
from vlserve.errors import RequestError
from vlserve.media.sources import read_source
from vlserve.prompt.chat_messages import ImagePart

DATA = bytes(range(256)) * 3 + b"?>~"  # in base64 with +, /, and lines of 76 characters
PLAIN = base64.b64encode(DATA + b"x").decode()  # with padding
LINES = base64.encodebytes(DATA + b"x").decode()
UNPADDED = PLAIN.rstrip("=")


def read(url: str, **options: int) -> object:
    return read_source(ImagePart(source=url, param="i", local=False), MediaConfig(**options))


GOOD = {
    "plain": "data:image/png;base64," + PLAIN,
    "lines": "data:image/png;base64," + LINES,
    "lines of mail": "data:image/png;base64,\r\n" + LINES.replace("\n", "\r\n"),
    "other blanks": f"data:image/png;base64,\t{PLAIN[:9]}\f{PLAIN[9:]} ",
    "a blank after the comma": "data:image/png;base64, " + PLAIN,
    "blanks before": " \n data:image/png;base64," + PLAIN,
    "no padding": "data:image/png;base64," + UNPADDED,
    "half the padding": f"data:image/png;base64,{UNPADDED}=",
    "a blank within the padding": f"data:image/png;base64,{UNPADDED}= =",
    "a blank before base64": "data:image/png; base64," + PLAIN,
    "blanks around base64": "data:image/png;\tbase64 ," + PLAIN,
    "a line within the type": "data:image/png;\nbase64," + PLAIN,
    "large letters": "DATA:IMAGE/PNG;BASE64," + PLAIN,
    "jpg": "data:image/jpg;base64," + PLAIN,
    "no type": "data:;base64," + PLAIN,
    "any type": "data:application/octet-stream;base64," + PLAIN,
    "a name": "data:image/png;name=a%20b.png;charset=utf-8;base64," + PLAIN,
    "escaped": "data:image/png;base64," + quote(PLAIN, safe=""),
    "small escapes": "data:image/png;base64," + quote(LINES, safe="").replace("%2B", "%2b").replace("%2F", "%2f"),
    "all escaped": "data:image/png;base64," + "".join(f"%{ord(character):02X}" for character in PLAIN),
    "a fragment": f"data:image/png;base64,{PLAIN}#page",
    "the alphabet for URLs": "data:image/png;base64," + base64.urlsafe_b64encode(DATA + b"x").decode(),
    "no base64": "data:image/png," + quote(DATA + b"x", safe=""),
    "no base64 and no type": "data:," + quote(DATA + b"x", safe=""),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_encoders_way_gives_the_bytes(name: str) -> None:
    assert read(GOOD[name]) == DATA + b"x"


DAMAGED = [
    PLAIN + "===",
    UNPADDED + "AAA",
    "=" + PLAIN,
    PLAIN[:8] + "=" + PLAIN[8:],
    PLAIN + "!",
    "\u00e4" + PLAIN,
    "%zz" + PLAIN,
]


@pytest.mark.parametrize("body", DAMAGED)
def test_damaged_base64_is_refused(body: str) -> None:
    with pytest.raises(RequestError, match="base64 is damaged") as caught:
        read("data:image/png;base64," + body)
    assert (caught.value.param, caught.value.code) == ("i", "invalid_base64_image")


def test_blanks_do_not_count_and_bytes_do() -> None:
    fits = base64.b64encode(bytes(2**20)).decode()
    assert read("data:;base64," + "\n".join(fits[i : i + 4] for i in range(0, len(fits), 4)), max_image_mib=1) == bytes(2**20)
    with pytest.raises(RequestError, match="more than 1048576 bytes") as caught:
        read("data:;base64," + base64.b64encode(bytes(2**20 + 9)).decode(), max_image_mib=1)
    assert caught.value.code == "image_file_too_large"
