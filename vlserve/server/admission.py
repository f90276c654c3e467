"""Who may come in: API keys, the number of open answers, draining. One object a router."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlserve.errors import ConfigError, EngineError, OverloadedError

log = logging.getLogger(__name__)
KEYS_VARIABLE = "VLSERVE_API_KEYS"
SHORT = 8  # characters


class Keys:
    """API keys, compared in constant time; without any, everyone may come in."""

    def __init__(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        self._digests = [_digest(key) for key in keys]
        if any(len(key) < SHORT for key in keys):
            log.warning("an API key has fewer than %d characters and can be guessed; give a longer one", SHORT)

    def allow(self, authorization: str | None) -> bool:
        """Whether an Authorization header's value is `Bearer` and one of the keys."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, always
        return scheme.lower() == "bearer" and any(matches)

    def owner(self, authorization: str | None) -> str:
        """Whose a request is: one word for each key, and one for all where there are no keys."""
        return _digest((authorization or "").partition(" ")[2].strip()).hex() if self._digests else ""


def read_keys(path: str | None, variable: str | None) -> tuple[str, ...]:
    """Keys from a file (one a line, # begins a comment line) and from the environment variable's value (commas)."""
    keys = [key.strip() for key in (variable or "").split(",")]
    if variable is not None and not any(keys):  # e.g. VLSERVE_API_KEYS=$KEY where KEY is not set: the server would be open
        raise ConfigError(f"{KEYS_VARIABLE} has no key; put one in it, or unset it to serve without keys")
    if path is not None:
        try:
            lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file {path!r} cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigError(f"api_key_file {path!r} has no key")
        keys += found
    return tuple(dict.fromkeys(key for key in keys if key))


class Admission:
    """Counts open answers; `limit` at most, and none while draining."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_open = 0
        self.is_draining = False

    @contextmanager
    def enter(self, number: int) -> Iterator[None]:
        """Hold room for `number` answers; raises when there is none, or when the server is about to end."""
        if self.is_draining:
            raise EngineError("the server is shutting down")
        if self.num_open + number > self.limit:
            raise OverloadedError(f"{self.num_open} answers are open; there is no room for {number} more, try again later")
        self.num_open += number
        try:
            yield
        finally:
            self.num_open -= number


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
