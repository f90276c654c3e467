"""Runs the app under uvicorn until a signal, or until the engine fails."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

import uvicorn

from vlserve.config import ServerConfig
from vlserve.errors import VLServeError
from vlserve.pipeline.vl_pipeline import VLPipeline
from vlserve.ranks.memory_report import memory_lines
from vlserve.server.admission import KEYS_VARIABLE, Admission
from vlserve.server.app import create_app
from vlserve.server.logs import configure_logging
from vlserve.system_limits import describe, find_refusal

log = logging.getLogger(__name__)
REFUSAL_S = 10.0  # between two lines on what the system refuses
LAST_WORDS_S = 3  # for open connections to be told, once the engine is gone


def serve(pipeline: VLPipeline, config: ServerConfig) -> int:
    """Serve until the end; returns the exit status: 0 after a signal, 1 when the engine failed."""
    configure_logging(config)
    server = _Server(pipeline, config)
    try:
        server.run()
    finally:
        pipeline.close()
    return 1 if server.failure is not None else 0


class _Server(uvicorn.Server):
    def __init__(self, pipeline: VLPipeline, config: ServerConfig) -> None:
        app = create_app(pipeline, config)
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                timeout_graceful_shutdown=LAST_WORDS_S,
                timeout_keep_alive=config.keep_alive,
                http="h11",  # httptools, taken where it is installed, drops the body behind `Upgrade: h2c` (curl --http2, Java)
                log_config=None,  # as configured above
                access_log=False,  # the routes write their own
                log_level="warning",
                server_header=False,
                ws="none",
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            )
        )
        self._admission: Admission = app.state.admission
        self.failure: VLServeError | None = None
        self._pipeline, self._server_config = pipeline, config
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_LoopErrors())
        await super().startup(sockets)
        if not self.started:
            return
        address = (
            self.servers[0].sockets[0].getsockname() if self.servers else (self._server_config.host, self._server_config.port)
        )
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        scheme = "https" if self._server_config.ssl_certfile else "http"
        log.info("listening on %s://%s:%d", scheme, host, address[1])
        if not self._server_config.api_keys and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
            log.warning(
                "anyone who reaches this address can use the server: no API key is set (--api-key-file or %s)", KEYS_VARIABLE
            )
        self._pipeline.client.on_failure = self._on_failure
        threading.Thread(target=self._announce, name="vlserve-announce", daemon=True).start()
        if self._pipeline.client.error is not None:  # it failed before we listened to it
            self._on_failure(self._pipeline.client.error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM lets open requests end first, for `drain_seconds`; Ctrl-C, or a second signal, ends at once."""
        if self._loop is None or self.should_exit:
            super().handle_exit(sig, frame)
            return
        wait = self._server_config.drain_seconds if sig == signal.SIGTERM and not self._admission.is_draining else 0.0
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._end(sig, wait)))

    async def _end(self, sig: int, wait: float) -> None:
        """Take no new requests; after `wait` seconds open ones get an error event; then the usual shutdown."""
        self._admission.is_draining = True
        deadline = time.monotonic() + wait
        while self._admission.num_open and time.monotonic() < deadline and not self.should_exit:
            await asyncio.sleep(0.05)
        if not self.should_exit:
            self._pipeline.client.on_failure = lambda error: None
            self._pipeline.client.fail_all("the server is shutting down")
            super().handle_exit(sig, None)

    def _on_failure(self, error: VLServeError) -> None:
        if self.failure is None:
            self.failure = error
            log.error("%s", error)
            self.should_exit = True

    def _announce(self) -> None:
        """Say when the model is ready; a failure is said by `_on_failure`."""
        try:
            ready = self._pipeline.client.wait_ready()
        except VLServeError:
            return
        tokens = ready.num_blocks * ready.block_size
        log.info(
            "%s is ready (%s, %s, context %d, KV cache for %d tokens)",
            *(self._pipeline.config.model, ready.device, ready.dtype, ready.max_model_len, tokens),
        )
        for line in memory_lines(self._pipeline.config, self._pipeline.checkpoint.config, self._pipeline.client.ready_ranks):
            log.info("%s", line)


class _LoopErrors:
    """The event loop's own errors. Without descriptors it fails to accept connections two thousand times a second, each with a
    traceback; what the system refuses is said once in a while instead, with the way out."""

    def __init__(self) -> None:
        self._last = -REFUSAL_S

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is None or find_refusal(error) is None:
            loop.default_exception_handler(context)
        elif time.monotonic() - self._last >= REFUSAL_S:
            self._last = time.monotonic()
            log.error("connections have to wait: %s", describe(error))
