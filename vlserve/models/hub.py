"""Whether the Hugging Face Hub can be reached, known in seconds: its own client tries for half a minute, in many lines."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

CONNECT_S = 5.0


def why_unreachable() -> str:
    """The reason why no connection to the Hub can be made; "" where one can, or where a proxy is asked."""
    from huggingface_hub.constants import ENDPOINT

    parts = urlsplit(ENDPOINT)
    if {parts.scheme, "all"} & getproxies().keys() or not parts.hostname:
        return ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_S).close()
    except OSError as error:
        return f"{parts.netloc} cannot be reached ({error.strerror or error}), and the model is not among those downloaded before"
    return ""
