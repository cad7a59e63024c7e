"""Coroutines that belong together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from grpc import aio


async def run_until_first_ends(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Runs coroutines side by side until one ends, and cancels the others.

    Raises:
        EOFError: gRPC cancelled the call under the one that ended first.
        Exception: what it raised else.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        if task.cancelled():  # not by us: to the caller it must not look like its own end
            raise EOFError("the call was cancelled")
        task.result()


async def write_all(call: aio.StreamStreamCall, messages: asyncio.Queue[Any]) -> None:
    """Sends what comes into the queue, until it is cancelled or the call has ended."""
    while True:
        await call.write(await messages.get())
