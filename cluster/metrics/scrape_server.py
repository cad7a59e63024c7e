"""The port that Prometheus reads."""

from __future__ import annotations

import asyncio
import errno
import logging
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from cluster.errors import ConfigError

logger = logging.getLogger(__name__)

_RETRY_S = 1.0


class ScrapeServer:
    """Serves a registry's metrics over plain HTTP, in threads of its own, until it is closed.

    Where the port is taken, by a router of this machine that is being replaced, it is tried again
    every second: that a router cannot be scraped must not keep it from serving.

    Args:
        registry: what is read.
        host, port: where to listen; port 0: any free one.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._registry = registry
        self._host = host
        self._wanted_port = port
        self.port = 0  # once it listens
        self._server: WSGIServer | None = None
        self._retrying = None if self._listen() else asyncio.create_task(self._retry())

    def _listen(self) -> bool:
        """Returns whether the port could be had. Raises: ConfigError."""
        try:
            self._server, _ = start_http_server(self._wanted_port, self._host, self._registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ConfigError("router.metrics_port", f"cannot be bound: {error}") from None
        self.port = self._server.server_port
        return True

    async def _retry(self) -> None:
        logger.warning("router.metrics_port %d is in use; waiting for it", self._wanted_port)
        while not self._listen():
            await asyncio.sleep(_RETRY_S)

    async def close(self) -> None:
        """Listens no longer."""
        if self._retrying is not None:
            self._retrying.cancel()
        if self._server is not None:
            await asyncio.to_thread(self._server.shutdown)
            self._server.server_close()
