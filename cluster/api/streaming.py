"""Server-sent events, several streams as one, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.api.errors import error_body
from cluster.errors import RequestCancelledError

T = TypeVar("T")

_DONE = b"data: [DONE]\n\n"
_PADDED_TO = 256  # bytes, or a multiple


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns; it is cancelled when the client leaves before.

    Raises:
        RequestCancelledError: the client has left.
    """
    return await _unless_disconnected(request.receive, work)


async def merged(
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """All streams' items as they come, with the number of their stream.

    The first stream that fails ends all of them. However this is left, every stream is closed.
    """
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await items.put((number, item))
            await items.put(None)
        except Exception as error:
            await items.put(error)

    tasks = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(streams)]
    try:
        num_running = len(tasks)
        while num_running > 0:
            item = await items.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events, ``[DONE]`` at the end.

    Guarantees: ``events`` is closed when the client leaves, also while nothing comes. What it fails
    with becomes an event, since the status has been sent.

    Args:
        first: taken from ``events`` already, so that what fails before it has a status of its own.
        events: JSON objects.
        write_timeout_s: a client that reads nothing for so long is taken to have left.
        pads: whether events get an ``obfuscation`` that makes them equally long, mostly.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: dict[str, Any],
        events: AsyncGenerator[dict[str, Any], None],
        write_timeout_s: float,
        *,
        pads: bool = False,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._write_timeout_s = write_timeout_s
        self._pads = pads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_disconnected(receive, self._send_all(send))
        except (RequestCancelledError, TimeoutError, OSError):
            pass  # nobody is there to be told
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        async def write(data: bytes, *, more: bool = True) -> None:
            async with asyncio.timeout(self._write_timeout_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await write(self._event(self._first))
        try:
            async for event in self._events:
                await write(self._event(event))
        except (TimeoutError, OSError):
            raise  # it cannot be told to a client that is not there
        except Exception as error:
            await write(_event(error_body(error)))
        await write(_DONE, more=False)

    def _event(self, payload: dict[str, Any]) -> bytes:
        if not self._pads:
            return _event(payload)
        size = len(_event({**payload, "obfuscation": ""}))
        # Random, since what repeats itself would be compressed away again.
        padding = secrets.token_hex(_PADDED_TO // 2)[: -size % _PADDED_TO]
        return _event({**payload, "obfuscation": padding})


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestCancelledError("the client has left")
        return task.result()
    finally:
        for other in (task, watch):
            other.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has left; what is left of its body is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False).encode() + b"\n\n"
