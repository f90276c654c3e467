"""Parts of messages that are pictures, in the shapes that clients of several APIs send."""

from __future__ import annotations

from typing import Any

import pytest

from vlserve.errors import RequestError
from vlserve.prompt.chat_messages import ImagePart, read_messages

URL = "data:image/png;base64,AAAA"


def read(part: dict[str, Any], *, local: bool = False) -> ImagePart:
    [turn] = read_messages([{"role": "user", "content": [{"type": "text", "text": "x"}, part]}], local=local)
    assert isinstance(turn.parts[1], ImagePart)
    return turn.parts[1]


@pytest.mark.parametrize(
    ("part", "source", "param"),
    [
        ({"type": "image_url", "image_url": {"url": URL}}, URL, "image_url"),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, URL, "image_url"),
        ({"type": "image", "image": URL}, URL, "image"),
        ({"type": "image", "image_url": {"url": URL}}, URL, "image_url"),
        ({"type": "image", "image_url": URL}, URL, "image_url"),
        ({"type": "image", "image": "https://example.com/a.png"}, "https://example.com/a.png", "image"),
        ({"type": "image", "image": {"url": URL}}, URL, "image"),
        ({"type": "image", "url": URL}, URL, "url"),
        ({"type": "image", "base64": "AAAA"}, "data:;base64,AAAA", "base64"),
        ({"type": "image", "data": "AAAA", "mimeType": "image/png"}, "data:;base64,AAAA", "data"),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "AAAA"}},
            "data:;base64,AAAA",
            "source",
        ),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": URL}}, URL, "source"),
        ({"type": "image", "source": {"type": "url", "url": "https://example.com/a"}}, "https://example.com/a", "source"),
        ({"type": "file", "file": {"file_data": URL, "filename": "a.png"}}, URL, "file.file_data"),
        ({"type": "input_file", "file_data": URL, "filename": "a.png"}, URL, "file_data"),
        (
            {"type": "file", "file": {"file_data": " DATA:image/webp;base64,AAAA"}},
            " DATA:image/webp;base64,AAAA",
            "file.file_data",
        ),
    ],
)
def test_pictures_of_every_api(part: dict[str, Any], source: str, param: str) -> None:
    for local in (False, True):
        read_part = read(part, local=local)
        assert (read_part.source, read_part.param) == (source, f"messages[0].content[1].{param}")
        assert read_part.local == (local and param == "image"), "only Python's own parts may be paths"


@pytest.mark.parametrize(
    ("part", "param", "message"),
    [
        ({"type": "image"}, "image", "is missing"),
        ({"type": "image", "image_url": {"path": "a.png"}}, "image_url.path", "not supported"),
        ({"text": "hi"}, "type", "type is missing; expected text, image_url, image or file"),
        ({"type": "picture"}, "type", "type is 'picture'; expected text, image_url, image or file"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "tiny"}}, "image_url.detail", "auto, low, high, original"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": ["low"]}}, "image_url.detail", "auto, low, high, original"),
        ({"type": "image", "image": 7}, "image", "data: or http"),
        ({"type": "image", "image": {"path": "/etc/passwd"}}, "image", "data: or http"),
        ({"type": "image", "url": ["x"]}, "url", "data: or http"),
        ({"type": "image", "source": URL}, "source", '"media_type": "image/png"'),
        ({"type": "image", "source": {"type": "file", "file_id": "1"}}, "source", '"type": "base64"'),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png"}}, "source.data", "as base64"),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "text/plain", "data": "x"}},
            "source.media_type",
            "text/plain",
        ),
        ({"type": "image", "source": {"type": "url"}}, "source.url", "must be a text"),
        ({"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}, "file.file_data", "other files"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "file.file_id", "not supported"),
        ({"type": "file"}, "file", "file_data"),
        ({"type": "input_file", "file_url": "https://example.com/a.pdf"}, "file_url", "not supported"),
    ],
)
def test_what_is_no_picture_is_named(part: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read(part)
    assert caught.value.param == f"messages[0].content[1].{param}"


@pytest.mark.parametrize(
    ("sent", "detail"), [(None, "auto"), ("auto", "auto"), ("low", "low"), ("high", "high"), ("original", "high")]
)
def test_a_pictures_detail(sent: str | None, detail: str) -> None:
    assert read({"type": "image_url", "image_url": {"url": URL, "detail": sent}}).detail == detail
    assert read({"type": "input_image", "image_url": URL, "detail": sent}).detail == detail


def test_options_of_one_picture() -> None:
    within = read({"type": "image_url", "image_url": {"url": URL, "detail": "high", "max_dynamic_patch": 6}})
    assert within.options == {"max_dynamic_patch": 6} and within.options_param == within.param and within.detail == "high"
    beside = read({"type": "image_url", "image_url": {"url": URL, "max_dynamic_patch": None}, "max_dynamic_patch": 6})
    assert beside.options == {"max_dynamic_patch": 6} and beside.options_param == "messages[0].content[1]"
    assert read({"type": "image", "image": URL, "max_dynamic_patch": 6}).options == {"max_dynamic_patch": 6}
    assert read({"type": "image_url", "image_url": {"url": URL, "min_pixels": 9}}).options == {"min_pixels": 9}
