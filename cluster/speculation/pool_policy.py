"""How many drafters there should be: decided on the goodput that one more, or one fewer, brings.

The same object decides for a cluster (``cluster.actors.autoscaling``) and for a simulated fleet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DraftDemand:
    """What one target replica says about the drafters that it shares with all others.

    Goodputs are tokens per second expected by its cost model at its load of now; they count while
    the replica has requests.

    Attributes:
        num_requests: that it runs.
        is_off: it does not speculate, but for probes.
        draft_seconds_per_second: drafters that it keeps busy.
        draft_queue_seconds: expected wait of a round on its drafter.
        goodput: with speculation and the drafters of now, or one where there is none;
            ``goodput_plain``: without speculation.
        goodput_added: with speculation and a drafter more; ``goodput_removed``: with one fewer.
    """

    num_requests: int = 0
    is_off: bool = True
    draft_seconds_per_second: float = 0.0
    draft_queue_seconds: float = 0.0
    goodput: float = 0.0
    goodput_plain: float = 0.0
    goodput_added: float = 0.0
    goodput_removed: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PoolTiming:
    """How the pool behaves in time and at the margin.

    Attributes:
        min_gain: a drafter is added while 1% more drafters promise ``min_gain`` % more tokens per
            second; with one drafter, or none, that is the gain of another one. One is taken away
            where it promised less than half of that.
        up_s: how long a drafter more must have been promising that.
        down_s: how long one fewer must have been good enough.
        to_zero_s: how long speculation must have been off everywhere.
        settle_s: after drafters have come or gone, time until the replicas' numbers tell of it.
        growth: largest share by which the pool grows or shrinks in one step; one is always allowed.
    """

    min_gain: float = 0.05
    up_s: float = 1.0
    down_s: float = 30.0
    to_zero_s: float = 60.0
    settle_s: float = 2.0
    growth: float = 0.25


class PoolPolicy:
    """Chooses the number of drafters.

    - *Up* at once, where the replicas' goodput together would rise enough with a drafter more.
    - *Down*, one step in ``down_s``, while it would fall by little.
    - *To zero* when speculation has been off everywhere for ``to_zero_s`` and a drafter more would
      not change that. Replicas without requests say nothing: an idle cluster keeps one drafter.
    - *From zero* when speculating with one drafter promises enough more than plain decoding.

    Pure but for its own memory: it is given the time (seconds of any one monotonic clock).

    Args:
        min_replicas, max_replicas: bounds on the decision.
        timing: dwell times and margins.

    Attributes:
        reason: of the last decision, in words for people.
    """

    def __init__(
        self, min_replicas: int, max_replicas: int, timing: PoolTiming | None = None
    ) -> None:
        if not 0 <= min_replicas <= max_replicas:
            raise ValueError("bounds must be 0 <= min_replicas <= max_replicas")
        self.reason = "nothing is known yet"
        self._min = min_replicas
        self._max = max_replicas
        self._timing = timing or PoolTiming()
        self._up_since: float | None = None
        self._down_since: float | None = None
        self._off_since: float | None = None
        self._ready = 0
        self._settled_at = 0.0

    def decide(
        self, demands: Sequence[DraftDemand], *, current: int, ready: int, now: float
    ) -> int:
        """How many drafters there should be.

        Args:
            demands: one of each target replica that reports.
            current: drafters wanted so far.
            ready: those of them that run.
            now: seconds.
        """
        if ready != self._ready:
            self._ready, self._settled_at = ready, now + self._timing.settle_s
        wanted = min(max(self._decide(demands, current, ready, now), self._min), self._max)
        if wanted != current:
            self._up_since = self._down_since = None
        return wanted

    def _decide(self, demands: Sequence[DraftDemand], current: int, ready: int, now: float) -> int:
        timing = self._timing
        busy = [demand for demand in demands if demand.num_requests > 0]
        gain = _gain_of_one_more(busy, ready) * max(current, 1)
        loss = _loss_of_one_fewer(busy) * current
        wants_more = gain >= timing.min_gain
        is_off = _is_off_everywhere(demands) and not wants_more
        self._off_since = _since(self._off_since, is_off, now)
        is_settled = now >= self._settled_at and ready >= current
        self._up_since = _since(self._up_since, wants_more and is_settled, now)
        can_lose = current > 1 and loss < timing.min_gain / 2 and not wants_more
        self._down_since = _since(self._down_since, can_lose and now >= self._settled_at, now)

        if self._off_since is not None and now - self._off_since >= timing.to_zero_s:
            self.reason = f"speculation has been off everywhere for {now - self._off_since:.0f} s"
            return 0
        if self._up_since is not None and now - self._up_since >= timing.up_s:
            added = max(int(current * timing.growth), 1)
            self.reason = f"a drafter more promises {gain / max(current, 1):+.1%} tokens/s"
            return current + added
        if self._down_since is not None and now - self._down_since >= timing.down_s:
            self.reason = f"a drafter fewer costs {loss / current:.1%} tokens/s"
            return current - max(int(current * timing.growth), 1)
        return current


# A replica that does better without speculation is counted with what it does without.


def _gain_of_one_more(busy: Sequence[DraftDemand], ready: int) -> float:
    """Share of goodput that a drafter more adds, all replicas together."""
    if ready == 0:
        now = sum(d.goodput_plain for d in busy)
        then = sum(max(d.goodput, d.goodput_plain) for d in busy)
    else:
        now = sum(max(d.goodput, d.goodput_plain) for d in busy)
        then = sum(max(d.goodput_added, d.goodput_plain) for d in busy)
    return (then - now) / now if now > 0 else 0.0


def _loss_of_one_fewer(busy: Sequence[DraftDemand]) -> float:
    """Share of goodput that a drafter fewer takes away, all replicas together."""
    now = sum(max(d.goodput, d.goodput_plain) for d in busy)
    then = sum(max(d.goodput_removed, d.goodput_plain) for d in busy)
    return (now - then) / now if now > 0 else 0.0


def _is_off_everywhere(demands: Sequence[DraftDemand]) -> bool:
    """Whether no replica speculates, and some would have something to speculate on, or had it."""
    telling = [demand for demand in demands if demand.num_requests > 0 or demand.is_off]
    return bool(telling) and all(
        demand.is_off or demand.draft_seconds_per_second == 0 for demand in telling
    )


def _since(since: float | None, holds: bool, now: float) -> float | None:
    """Since when something has held without a break."""
    if not holds:
        return None
    return now if since is None else since
