"""What the calls of one API key may take, over all routers together.

Routers do not talk to each other about it: with R of them, each allows its share of every limit,
``limit / R`` (whole numbers rounded up). So with R routers that know of each other

- all together never begin more than the limit, plus R - 1 where it is a whole number (requests at a
  time, queued tokens), plus R requests in the first moment where it is a rate (each router lets
  through one second's share, and at least one, at once);
- a client that talks to one router only gets that router's share.

What runs is never ended, and nobody counts what runs on routers that are being stopped, or was
begun under a smaller R: until it has ended, that comes on top, for every change of the routers as
much as the limit plus R - 1 once more. While the list changes, those that have not heard of it (a
second or two) use the former R.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from cluster.errors import QueueFullError
from cluster.security.api_keys import ApiKey
from cluster.security.refusals import Refusal, Refusals

# For limits that end when other requests do, and nobody knows when that is.
_RETRY_AFTER_S = 1.0
# Keys that no call uses are forgotten beyond so many.
_MAX_IDLE = 1000


@dataclass
class _Use:
    """What one key has in use here, and the requests that it may begin at once."""

    num_requests: int = 0
    num_tokens: int = 0
    allowance: float = 0.0
    filled_at: float = -math.inf


class KeyLimits:
    """Holds the calls of each key to its limits. Belongs to one event loop.

    Args:
        refusals: counted into.
        clock: monotonic seconds.
    """

    def __init__(
        self, refusals: Refusals | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._refusals = refusals or Refusals()
        self._clock = clock
        self._num_routers = 1
        self._uses: dict[str, _Use] = {}

    def set_num_routers(self, num_routers: int) -> None:
        """Says how many routers there are, this one included."""
        self._num_routers = max(1, num_routers)

    def begin(self, key: ApiKey) -> LimitedCall:
        """Begins a call, to be used as a context manager; its end frees what it took.

        Raises:
            QueueFullError: the key's rate, or its number of requests, is used up; says when to try
                again.
        """
        use = self._use_of(key)
        most = self._share(key.max_concurrent_requests)
        if most is not None and use.num_requests >= most:
            self._refuse(
                key,
                Refusal.CONCURRENCY,
                f"{most} requests at a time on this router",
                _RETRY_AFTER_S,
            )
        self._take_allowance(key, use)
        return LimitedCall(self, key, use)

    def count(self, key: ApiKey) -> None:
        """A call that holds nothing: only the key's rate is asked. Raises: QueueFullError."""
        self._take_allowance(key, self._use_of(key))

    def in_use(self, key: ApiKey) -> tuple[int, int]:
        """The key's (requests, queued tokens) on this router."""
        use = self._uses.get(key.name, _Use())
        return use.num_requests, use.num_tokens

    def _take_allowance(self, key: ApiKey, use: _Use) -> None:
        if key.requests_per_second is None:
            return
        rate = key.requests_per_second / self._num_routers
        now = self._clock()
        most = max(1.0, rate)
        use.allowance = min(most, use.allowance + (now - use.filled_at) * rate)
        use.filled_at = now
        if use.allowance < 1.0:
            self._refuse(
                key,
                Refusal.REQUEST_RATE,
                f"{rate:g} requests a second on this router",
                (1.0 - use.allowance) / rate,
            )
        use.allowance -= 1.0

    def _take_tokens(self, key: ApiKey, use: _Use, num_tokens: int) -> None:
        most = self._share(key.max_queued_tokens)
        if most is not None and use.num_tokens + num_tokens > most:
            self._refuse(
                key,
                Refusal.QUEUED_TOKENS,
                f"{most} queued tokens on this router, of which {use.num_tokens} are taken "
                f"and the request needs {num_tokens}",
                _RETRY_AFTER_S,
            )
        use.num_tokens += num_tokens

    def _share(self, limit: int | None) -> int | None:
        return None if limit is None else math.ceil(limit / self._num_routers)

    def _refuse(self, key: ApiKey, reason: Refusal, limit: str, retry_after_s: float) -> None:
        self._refusals.count(reason, f"key {key.name}")
        raise QueueFullError(f"API key {key.name!r} may have {limit}", retry_after_s)

    def _use_of(self, key: ApiKey) -> _Use:
        use = self._uses.get(key.name)
        if use is None:
            use = self._uses[key.name] = self._new_use()
        return use

    def _new_use(self) -> _Use:
        if len(self._uses) >= _MAX_IDLE:
            # A key whose calls have ended starts anew, with one second's share: names come from
            # the key file only, so that nobody gains by it.
            idle = [name for name, use in self._uses.items() if use.num_requests == 0]
            for name in idle:
                del self._uses[name]
        return _Use()


class LimitedCall:
    """One call's part of its key's limits."""

    def __init__(self, limits: KeyLimits, key: ApiKey, use: _Use) -> None:
        self._limits, self._key, self._use = limits, key, use
        self._num_tokens = 0

    def take_tokens(self, num_tokens: int) -> None:
        """Adds to the key's queued tokens, until the call ends. Raises: QueueFullError."""
        self._limits._take_tokens(self._key, self._use, num_tokens)
        self._num_tokens += num_tokens

    def __enter__(self) -> Self:
        self._use.num_requests += 1
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._use.num_requests -= 1
        self._use.num_tokens -= self._num_tokens
