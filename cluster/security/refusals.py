"""What a part of the cluster has refused, counted by reason."""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

# One line a reason in so many seconds; whoever attacks must not fill the disk.
LOG_INTERVAL_S = 10.0


class Refusal(enum.StrEnum):
    """Why something was refused."""

    HANDSHAKE = "handshake"  # plaintext, or a certificate that is missing, unknown or expired
    NO_KEY = "no_key"
    UNKNOWN_KEY = "unknown_key"
    WRONG_PEER = "wrong_peer"  # a good certificate that is not the cluster's own
    REQUEST_RATE = "request_rate"
    CONCURRENCY = "concurrency"
    QUEUED_TOKENS = "queued_tokens"
    SLOW_READER = "slow_reader"
    SLOW_SENDER = "slow_sender"


class Refusals:
    """Counts of one process. Thread-safe.

    Guarantees: never lets anything of a call into the log but what ``describe`` says, and at most
    one line a reason in ``LOG_INTERVAL_S``; the next line says how many it stands for.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: Counter[Refusal] = Counter()
        self._logged: dict[Refusal, tuple[float, int]] = {}  # when, and the count of then

    def count(self, reason: Refusal, describe: str = "", number: int = 1) -> None:
        """Notes a refusal.

        Args:
            describe: for the log: a key's name, a peer's address, a path; nothing secret.
            number: of refusals.
        """
        now = self._clock()
        with self._lock:
            self._counts[reason] += number
            total = self._counts[reason]
            logged_at, logged_total = self._logged.get(reason, (-LOG_INTERVAL_S, 0))
            if now - logged_at < LOG_INTERVAL_S:
                return
            self._logged[reason] = (now, total)
        logger.warning(
            "refused (%s): %s; %d since the last line", reason, describe, total - logged_total
        )

    @property
    def counts(self) -> Mapping[str, int]:
        """Refusals since the start, for every reason there is."""
        with self._lock:
            return {str(reason): self._counts[reason] for reason in Refusal}
