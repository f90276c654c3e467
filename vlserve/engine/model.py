"""Where `Model` used to live; packages that import it from here go on working, with a warning."""

from __future__ import annotations

import warnings
from typing import Any

_MOVED = ("Model", "build_decoder")


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlserve.models import base

    warnings.warn(f"{name} has moved: import it from vlserve.models.base", DeprecationWarning, stacklevel=2)
    return getattr(base, name)
