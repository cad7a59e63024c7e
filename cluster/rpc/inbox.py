"""Messages that are on their way into a server."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import aio

from cluster.errors import DeadlineExceededError, QueueFullError
from cluster.security.refusals import Refusal, Refusals

RECEIVE_TIMEOUT_S = 30.0


class Inbox:
    """Bounds what unfinished messages hold: of each gRPC keeps what has come, however slowly.

    Guarantees: no message is waited for longer than ``RECEIVE_TIMEOUT_S``; while more than ``most``
    are on their way, the oldest give way once they have been for ``patience_s``. So silent clients
    keep nobody out: what is complete is taken before it is old. Belongs to one event loop.

    Args:
        most: messages on their way, beside those that began within ``patience_s``.
        refusals: counted into.
    """

    def __init__(
        self,
        most: int,
        *,
        patience_s: float,
        timeout_s: float = RECEIVE_TIMEOUT_S,
        refusals: Refusals | None = None,
    ) -> None:
        self._most = most
        self._patience_s = patience_s
        self._timeout_s = timeout_s
        self._refusals = refusals or Refusals()
        self._awaited: dict[asyncio.Timeout, float] = {}  # since when, oldest first

    @property
    def num_awaited(self) -> int:
        """Messages that are on their way."""
        return len(self._awaited)

    async def receive(self, context: aio.ServicerContext) -> Any:
        """The next message of a call, ``None`` behind the last.

        Raises:
            QueueFullError: it gave way to newer ones.
            DeadlineExceededError: it did not come in time.
        """
        began_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._timeout_s) as scope:
                self._awaited[scope] = began_at
                self._make_room(began_at)
                message = await context.read()
        except TimeoutError:
            self._refusals.count(Refusal.SLOW_SENDER, context.peer())
            if scope in self._awaited:
                message = f"the call's message did not come within {self._timeout_s:g} s"
                raise DeadlineExceededError(message) from None
            raise QueueFullError("too many calls have not sent their message yet", 1.0) from None
        finally:
            self._awaited.pop(scope, None)
        return None if message is aio.EOF else message

    def _make_room(self, now: float) -> None:
        while len(self._awaited) > self._most:
            oldest, began_at = next(iter(self._awaited.items()))
            if now - began_at < self._patience_s:
                return
            del self._awaited[oldest]
            oldest.reschedule(now)
