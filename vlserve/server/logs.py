"""The server's log on standard error: lines for people, or one JSON document a line.

What a client sent never gets into it: no prompts, bodies, keys or addresses of pictures.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from vlserve.config import ServerConfig
from vlserve.engine.messages import FinishReason
from vlserve.pipeline.outputs import Usage

log = logging.getLogger(__name__)


def configure_logging(config: ServerConfig) -> None:
    """For a process that is a server: a library's user owns logging otherwise.

    Other packages are heard from warnings on only; HTTP clients, for one, log addresses at info.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("vlserve").setLevel(config.log_level.upper())
    logging.getLogger("uvicorn.error").addFilter(_is_no_advice_on_upgrades)


def _is_no_advice_on_upgrades(record: logging.LogRecord) -> bool:
    """`Upgrade: h2c` is answered in HTTP/1.1, which is all right; uvicorn warns of it and advises to install WebSockets."""
    text = record.getMessage()
    return text != "Unsupported upgrade request." and not text.startswith("No supported WebSocket library")


def access_line(
    request_id: str, route: str, status: int, seconds: float, answers: Sequence[tuple[FinishReason, Usage]]
) -> dict[str, Any]:
    """The fields of one request's line; tokens are sums over its answers and left out where it had none."""
    line: dict[str, Any] = {"request_id": request_id, "route": route, "status": status, "seconds": round(seconds, 3)}
    if answers:
        line["finish_reason"] = ",".join(reason for reason, _ in answers)
        for name in Usage.__dataclass_fields__:
            line[name] = sum(getattr(usage, name) for _, usage in answers)
    return line


class TextFormatter(logging.Formatter):
    """`time vlserve: message name=value ...`, with the level from warnings on."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        line = f"{_time(record):%Y-%m-%d %H:%M:%S} vlserve: {level}{record.getMessage()}"
        line += "".join(f" {name}={value}" for name, value in _fields(record).items())
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and what `extra={"fields": {...}}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record).astimezone(timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return fields


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created).astimezone()


_said: set[str] = set()


def say_once(text: str) -> None:
    """A line for what is taken and has no effect; once, since clients send it with every request."""
    if text not in _said:
        _said.add(text)
        log.warning("%s (said once)", text)
