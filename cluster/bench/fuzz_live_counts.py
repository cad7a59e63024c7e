"""What becomes of messages that are sent to live servers, and who sends them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

# A machine that does something else beside may keep a call waiting; a call that hangs never ends.
CALL_TIMEOUT_S = 30.0
NUM_AT_ONCE = 16
_MAX_KEPT = 20


class LiveCounts:
    """Counts calls by their outcomes, and keeps what must not have been.

    Attributes:
        num_messages: sent.
        outcomes: of calls, as ``cluster.rpc.raw_call`` names them.
        failures: outcomes that no message may have, and calls that hung; no more than a few.
        slowest_s: the longest call.
        num_late: calls that were ended at ``CALL_TIMEOUT_S``.
    """

    def __init__(self) -> None:
        self.num_messages = 0
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest_s = 0.0
        self.num_late = 0
        self._late: list[tuple[Callable[[], Awaitable[str]], bytes]] = []

    async def send_all(
        self, num_messages: int, make_call: Callable[[], tuple[Callable[[], Awaitable[str]], bytes]]
    ) -> None:
        """Sends that many messages, ``NUM_AT_ONCE`` calls at a time.

        A call that was late is made once more when the others are through: only one that is late
        again, alone, has hung.

        Args:
            make_call: counts its messages in ``num_messages``, and returns a call that can be
                repeated, and what it sends.
        """

        async def worker() -> None:
            while self.num_messages < num_messages:
                call, sent = make_call()
                await self._count(call, sent)

        await asyncio.gather(*(worker() for _ in range(NUM_AT_ONCE)))
        for call, sent in self._late:
            outcome = await _outcome(call)
            if outcome == "TIMEOUT":
                self.fail(f"{outcome}, twice: {sent.hex()}")

    def fail(self, what: str) -> None:
        """Keeps what must not be."""
        if len(self.failures) < _MAX_KEPT:
            self.failures.append(what[:2000])

    def figures(self) -> dict[str, Any]:
        """For the report."""
        return {
            "messages": self.num_messages,
            "outcomes": dict(self.outcomes),
            "late_calls": self.num_late,
            "slowest_s": round(self.slowest_s, 1),
            "failures": self.failures,
        }

    async def _count(self, call: Callable[[], Awaitable[str]], sent: bytes) -> None:
        started = time.monotonic()
        outcome = await _outcome(call)
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        self.outcomes[outcome.partition(":")[0]] += 1
        if outcome.startswith("INTERNAL") or "without details" in outcome:
            self.fail(f"{outcome}: {sent.hex()}")
        elif outcome == "TIMEOUT":
            self.num_late += 1
            if len(self._late) < _MAX_KEPT:
                self._late.append((call, sent))


async def _outcome(call: Callable[[], Awaitable[str]]) -> str:
    try:
        return await call()
    except TimeoutError:
        return "TIMEOUT"
    except Exception as error:  # a client's, which no answer of ours may cause
        return f"INTERNAL: {error!r}"
