"""How many target replicas there should be, for the requests there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TargetLoad:
    """How full one target replica is.

    Attributes:
        num_requests: that it runs, or that wait on it.
        kv_cache_usage: share of its pages that requests hold.
    """

    num_requests: int = 0
    kv_cache_usage: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TargetTiming:
    """How the number of target replicas behaves.

    Attributes:
        target_load: share of a replica's places for requests, and of its pages, that should be
            taken; there is no change while it is off by less than ``tolerance`` (a share of it).
        up_s: how long there must have been too few, down_s: too many.
    """

    target_load: float = 0.7
    tolerance: float = 0.1
    up_s: float = 5.0
    down_s: float = 120.0


class TargetPolicy:
    """Chooses the number of target replicas, so that each is as full as wanted.

    Pure but for its own memory: it is given the time (seconds of any one monotonic clock).

    Args:
        min_replicas, max_replicas: bounds on the decision, at least 1.
        max_num_seqs: places for requests on each.
        timing: dwell times and the load that is wanted.
    """

    def __init__(
        self,
        min_replicas: int,
        max_replicas: int,
        max_num_seqs: int,
        timing: TargetTiming | None = None,
    ) -> None:
        if not 1 <= min_replicas <= max_replicas:
            raise ValueError("bounds must be 1 <= min_replicas <= max_replicas")
        self._min = min_replicas
        self._max = max_replicas
        self._max_num_seqs = max_num_seqs
        self._timing = timing or TargetTiming()
        self._few_since: float | None = None
        self._many_since: float | None = None

    def decide(
        self, loads: Sequence[TargetLoad], *, num_requests: int, current: int, now: float
    ) -> int:
        """How many target replicas there should be.

        Args:
            loads: one of each replica that reports.
            num_requests: that routers have, those which wait for a replica included.
            current: replicas wanted so far.
            now: seconds.
        """
        timing = self._timing
        placed = sum(load.num_requests for load in loads)
        places = max(num_requests, placed) / self._max_num_seqs
        pages = sum(load.kv_cache_usage for load in loads)  # in caches of one replica
        needed = max(places, pages) / timing.target_load
        desired = min(max(math.ceil(needed), self._min), self._max)
        if abs(needed - current) <= timing.tolerance * current and self._min <= current:
            desired = min(current, self._max)
        self._few_since = _since(self._few_since, desired > current, now)
        self._many_since = _since(self._many_since, desired < current, now)
        is_few = self._few_since is not None and now - self._few_since >= timing.up_s
        is_many = self._many_since is not None and now - self._many_since >= timing.down_s
        if not is_few and not is_many:
            return min(max(current, self._min), self._max)
        self._few_since = self._many_since = None
        return desired


def _since(since: float | None, holds: bool, now: float) -> float | None:
    if not holds:
        return None
    return now if since is None else since
