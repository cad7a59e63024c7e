"""The choices of one client's request that full queues have sent back."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Protocol

# A large request keeps so many in queues at least; more where half of what they took is more.
_MIN_QUEUED = 4


class Resubmittable(Protocol):
    """Something that can be sent to a replica again; hashable by identity."""

    def resubmit(self) -> None:
        """Tries a replica again."""


class Siblings:
    """Lets a request that is larger than the queues of the replicas through piece by piece.

    Guarantees: a choice that every queue refused waits here while another one of its request is
    under way, or has been; it is sent again as others begin and end, and every second or so. So a
    request is refused for full queues only before it was accepted: something of it has begun, has
    waited for a replica, or has lost the one that had taken it. From the first refusal on it keeps
    at most half of what the queues took, so that others find room in them. What waits here is
    under the request's admission, and costs no replica anything. Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._under_way: set[Resubmittable] = set()
        self._queued: set[Resubmittable] = set()  # those under way of which nothing has come
        self._max_queued = _MIN_QUEUED
        self._waiting: dict[Resubmittable, None] = {}  # in the order of refusals
        self._is_accepted = False
        self._moved_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    def submitted(self, choice: Resubmittable) -> None:
        """It was sent to a replica."""
        self._under_way.add(choice)
        self._queued.add(choice)

    def accept(self) -> None:
        """From now on the request waits where queues are full."""
        self._is_accepted = True
        self._moved_at = time.monotonic()

    def stand_still(self, limit_s: float) -> bool:
        """Whether nothing is under way, and for so long nothing has come or was accepted."""
        return not self._under_way and time.monotonic() >= self._moved_at + limit_s

    def begun(self, choice: Resubmittable) -> None:
        """Something came of it."""
        self.accept()
        self._queued.discard(choice)
        self._resubmit()

    def refused(self, choice: Resubmittable, retry_after_s: float) -> bool:
        """No queue had room for it. Returns whether it waits here; else it has failed."""
        self._under_way.discard(choice)
        self._queued.discard(choice)
        if not self._under_way and not self._is_accepted:
            return False
        self._max_queued = max(_MIN_QUEUED, len(self._queued) // 2)
        self._waiting[choice] = None
        if self._timer is None:
            self._start_timer(retry_after_s)
        return True

    def finished(self, choice: Resubmittable) -> None:
        """It is through: what it took is free for one that waits."""
        self.withdraw(choice)
        self._resubmit()

    def withdraw(self, choice: Resubmittable) -> None:
        """It has failed or is wanted no longer."""
        self._under_way.discard(choice)
        self._queued.discard(choice)
        self._waiting.pop(choice, None)
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_timer(self, delay_s: float) -> None:
        # Requests that were refused together do not come back together.
        event_loop = asyncio.get_running_loop()
        self._timer = event_loop.call_later(
            delay_s * random.uniform(1.0, 1.5), self._on_timer, delay_s
        )

    def _on_timer(self, delay_s: float) -> None:
        self._timer = None
        self._resubmit()
        if self._waiting:
            self._start_timer(delay_s)

    def _resubmit(self) -> None:
        for _ in range(min(len(self._waiting), self._max_queued - len(self._queued))):
            choice = next(iter(self._waiting))
            del self._waiting[choice]
            choice.resubmit()
