"""The one tree of errors that a user can cause; every message names the value and the way out."""

from __future__ import annotations


class VLServeError(Exception):
    """Base of everything vlserve raises on purpose."""


class ConfigError(VLServeError):
    """An option of the engine or the command line is wrong."""


class ModelError(VLServeError):
    """A checkpoint is missing, incomplete, damaged or of an unsupported architecture."""


class RequestError(VLServeError):
    """One request is wrong; others are not touched.

    `param` names the request's field, `code` is a short stable word for programs.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class EngineError(VLServeError):
    """The engine is not there: still loading, failed, or shutting down."""


class DeadlineError(EngineError):
    """A request's time was up before its answer was whole."""


class OverloadedError(EngineError):
    """Too many requests are open; try again later."""
