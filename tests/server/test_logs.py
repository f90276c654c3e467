"""Log lines: what a request's line says, and the two formats of any line."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from vlserve.config import ServerConfig
from vlserve.errors import ConfigError
from vlserve.pipeline.outputs import Usage
from vlserve.server.logs import JsonFormatter, TextFormatter, access_line


def usage(prompt: int, completion: int) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=completion, image_tokens=2, cached_tokens=1)


def record(level: int, message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("vlserve.x").makeRecord("vlserve.x", level, "x.py", 1, message, arguments, None, extra=extra)


def test_access_line() -> None:
    assert access_line("req-1", "/v1/models", 200, 0.12345, []) == {
        "request_id": "req-1",
        "route": "/v1/models",
        "status": 200,
        "seconds": 0.123,
    }
    line = access_line("req-2", "/v1/chat/completions", 200, 2.0, [("stop", usage(10, 3)), ("length", usage(10, 4))])
    assert {key: line[key] for key in list(line)[4:]} == {
        "finish_reason": "stop,length",
        "prompt_tokens": 20,
        "completion_tokens": 7,
        "image_tokens": 4,
        "cached_tokens": 2,
    }


def test_text_lines() -> None:
    lines = [
        TextFormatter().format(record(logging.INFO, "listening on %s", "here")),
        TextFormatter().format(record(logging.ERROR, "broken")),
        TextFormatter().format(record(logging.INFO, "request", fields={"route": "/live", "status": 200})),
    ]
    assert [line[20:] for line in lines] == [
        "vlserve: listening on here",
        "vlserve: error: broken",
        "vlserve: request route=/live status=200",
    ]
    assert [line[4] + line[10] + line[13] for line in lines] == ["- :"] * 3


def test_json_lines_stay_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        failed = record(logging.ERROR, 'a "quoted"\nü')
        failed.exc_info = sys.exc_info()
    for entry in (failed, record(logging.INFO, "request", fields={"status": 200})):
        text = JsonFormatter().format(entry)
        line = json.loads(text)
        assert "\n" not in text and line["level"] in ("error", "info") and line["logger"] == "vlserve.x"
        assert line["time"].endswith("+00:00")
    assert "ValueError: two\nlines" in json.loads(JsonFormatter().format(failed))["exception"] and line["status"] == 200


def test_options() -> None:
    with pytest.raises(ConfigError, match="log_format is 'xml'; expected one of text, json"):
        ServerConfig(log_format="xml")
    with pytest.raises(ConfigError, match="log_level is 'loud'"):
        ServerConfig(log_level="loud")
