"""Runs the app under uvicorn until a signal, or until the engine fails."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from types import FrameType

import uvicorn

from vlserve.config import ServerConfig
from vlserve.errors import VLServeError
from vlserve.pipeline import VLPipeline
from vlserve.server.app import create_app
from vlserve.server.logs import configure_logging

log = logging.getLogger(__name__)
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
        app = create_app(pipeline, model_name=config.served_model_name)
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                timeout_graceful_shutdown=LAST_WORDS_S,
                log_config=None,  # as configured above
                access_log=False,  # the routes write their own
                log_level="warning",
            )
        )
        self.failure: VLServeError | None = None
        self._pipeline, self._server_config = pipeline, config
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.started:
            return
        address = (
            self.servers[0].sockets[0].getsockname() if self.servers else (self._server_config.host, self._server_config.port)
        )
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        log.info("listening on http://%s:%d", host, address[1])
        self._pipeline.client.on_failure = self._on_failure
        threading.Thread(target=self._announce, name="vlserve-announce", daemon=True).start()
        if self._pipeline.client.error is not None:  # it failed before we listened to it
            self._on_failure(self._pipeline.client.error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: open requests get an error event now, then the usual shutdown."""
        if self._loop is not None and not self.should_exit:
            self._pipeline.client.on_failure = lambda error: None
            self._loop.call_soon_threadsafe(self._pipeline.client.fail_all, "the server is shutting down")
        super().handle_exit(sig, frame)

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
