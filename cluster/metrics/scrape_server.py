"""The port that Prometheus reads, and whoever asks whether the router is ready."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from cluster.errors import ConfigError

logger = logging.getLogger(__name__)

_RETRY_S = 1.0

_App = Callable[..., Iterable[bytes]]


class ScrapeServer:
    """Serves a registry's metrics over plain HTTP, in threads of its own, until it is closed.

    Where the port is taken, by a router of this machine that is being replaced, it is tried again
    every second: that a router cannot be scraped must not keep it from serving.

    Args:
        registry: what is read.
        host, port: where to listen; port 0: any free one.
        is_ready: whether ``/ready`` answers 200, or 503; it is asked in another thread.

    Raises:
        ConfigError: the address cannot be bound, and will not become free.
    """

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, is_ready: Callable[[], bool]
    ) -> None:
        self._app = _with_ready(_in_text_format(make_wsgi_app(registry)), is_ready)
        self._host = host
        self._wanted_port = port
        self.port = 0  # once it listens
        self._server: WSGIServer | None = None
        self._retrying = None if self._listen() else asyncio.create_task(self._retry())

    def _listen(self) -> bool:
        """Returns whether the port could be had."""
        try:
            self._server = make_server(
                self._host,
                self._wanted_port,
                self._app,
                server_class=ThreadingWSGIServer,
                handler_class=_QuietHandler,
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ConfigError("router.metrics_port", f"cannot be bound: {error}") from None
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="scrapes", daemon=True).start()
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


class _QuietHandler(WSGIRequestHandler):
    """Writes no line for each scrape."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _with_ready(app: _App, is_ready: Callable[[], bool]) -> _App:
    """``app``, and ``/ready`` as the HTTP API has it."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/ready":
            return app(environ, start_response)
        ready = is_ready()
        headers = [("Content-Type", "text/plain; charset=utf-8")]
        start_response("200 OK" if ready else "503 Service Unavailable", headers)
        return [b"ready\n" if ready else b"not ready\n"]

    return answer


def _in_text_format(app: _App) -> _App:
    """``app``, whatever form the client would rather have: in OpenMetrics' form prometheus_client
    (0.26) writes an underscore for each colon of a name."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return app({**environ, "HTTP_ACCEPT": "text/plain;version=0.0.4"}, start_response)

    return answer
