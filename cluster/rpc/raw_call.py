"""Calls with bytes for messages, whatever they are: for fuzzing a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence

from grpc import aio

from cluster.rpc.status import has_details

# What gRPC says on this side where a message is being written to a stream that has ended.
_ENDED_WHILE_WRITING = "Internal error from Core"


async def call_unary(channel: aio.Channel, method: str, data: bytes, *, timeout_s: float) -> str:
    """One message, answered by a stream that is read to its end.

    Returns:
        The outcome: ``OK``, ``TIMEOUT``, or the status' name, with its message where that is
        INTERNAL, and followed by "without details" where it is gRPC's own and not ours.
    """

    async def call() -> None:
        async for _ in channel.unary_stream(method)(data, timeout=timeout_s):
            pass

    return await _outcome(call(), timeout_s)


async def call_stream(
    channel: aio.Channel, method: str, messages: Sequence[bytes], *, timeout_s: float
) -> str:
    """Messages on a stream, whose answers are read to its end. Returns as ``call_unary``, or
    ``ended while writing``."""

    async def call() -> None:
        stream = channel.stream_stream(method)()
        for message in messages:
            await stream.write(message)
        await stream.done_writing()
        while await stream.read() is not aio.EOF:
            pass

    return await _outcome(call(), timeout_s)


async def _outcome(call: Awaitable[None], timeout_s: float) -> str:
    try:
        async with asyncio.timeout(timeout_s):
            await call
    except aio.AioRpcError as error:
        name: str = error.code().name
        if error.details() == _ENDED_WHILE_WRITING:
            return "ended while writing"
        if not has_details(error):
            return f"{name} without details: {error.details()}"
        return f"INTERNAL: {error.details()}" if name == "INTERNAL" else name
    except asyncio.InvalidStateError:  # another way of gRPC's to say so
        return "ended while writing"
    except TimeoutError:
        return "TIMEOUT"
    return "OK"
