"""A server of streams of bytes, whatever they are: for fuzzing a client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from grpc import aio

from cluster.rpc.channels import server_options

# Reads a message, or None at the stream's end; writes one.
Read = Callable[[], Awaitable[bytes | None]]
Write = Callable[[bytes], Awaitable[None]]
Handler = Callable[[Read, Write], Awaitable[None]]


class RawServer:
    """Serves a service's RPCs, all of them streams both ways; belongs to one event loop.

    Args:
        service: its full name.
        handlers: by RPC; each runs once for every call, and is cancelled when its client leaves.
    """

    def __init__(self, service: str, handlers: Mapping[str, Handler]) -> None:
        self._service = service
        self._handlers = handlers

    async def start(self, host: str) -> int:
        """Returns the port."""
        self._server = aio.server(options=server_options())
        methods = {
            name: grpc.stream_stream_rpc_method_handler(_behaviour(handler))
            for name, handler in self._handlers.items()
        }
        generic = grpc.method_handlers_generic_handler(self._service, methods)
        self._server.add_generic_rpc_handlers((generic,))
        port: int = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        return port

    async def stop(self) -> None:
        """Ends every call."""
        await self._server.stop(0)


def _behaviour(handler: Handler) -> Callable[[Any, aio.ServicerContext], Awaitable[None]]:
    async def serve(_: Any, context: aio.ServicerContext) -> None:
        async def read() -> bytes | None:
            message = await context.read()
            return None if message is aio.EOF else bytes(message)

        try:
            await handler(read, context.write)
        except (aio.BaseError, asyncio.InvalidStateError):
            return  # the client has left

    return serve
