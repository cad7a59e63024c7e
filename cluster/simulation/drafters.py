"""The pool of drafters: devices that take a pass for all that has arrived, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.simulation.events import Events
from cluster.speculation.draft_curve import DraftCurve

# How long a drafter's utilisation is averaged over where its queue is only estimated.
_LOAD_PERIOD_S = 1.0
_FULL = 0.95


@dataclass(frozen=True, slots=True)
class DraftAnswer:
    """What a drafter tells of a round's part: seconds of its pass, and of the wait before."""

    compute_s: float
    queue_s: float


@dataclass(slots=True)
class _Part:
    num_sessions: int
    num_tokens: int
    arrived_s: float
    answer: Callable[[DraftAnswer], None]


class SimulatedDrafter:
    """One device. Rounds that arrive during a pass are drafted together in the next one.

    Attributes:
        busy_s: time spent in passes so far.
    """

    def __init__(self, curve: DraftCurve, network_s: float, events: Events) -> None:
        self._curve = curve
        self._network_s = network_s
        self._events = events
        self._queue: list[_Part] = []
        self._is_busy = False
        self.busy_s = 0.0
        self._period_start = events.now
        self._period_busy_s = 0.0
        self._load = 0.0

    def submit(
        self, num_sessions: int, num_tokens: int, answer: Callable[[DraftAnswer], None]
    ) -> None:
        """Sends a round's part now; ``answer`` is called when its answer is back."""
        arrives = self._events.now + self._network_s / 2
        part = _Part(num_sessions, num_tokens, arrives, answer)
        self._events.at(arrives, lambda: self._take(part))

    def estimate(self, num_sessions: int, num_tokens: int) -> DraftAnswer:
        """Answers a part at once: the wait is what a queue would be expected to be at the load of
        the last second (random arrivals, equal passes)."""
        compute_s = self.work(num_sessions, num_tokens, 1)
        return DraftAnswer(compute_s, compute_s * self._load / (2 * (1 - self._load)))

    def work(self, num_sessions: int, num_tokens: int, num_rounds: int) -> float:
        """Counts passes that are only estimated; returns the seconds of one."""
        compute_s = float(self._curve.seconds(num_sessions, num_tokens))
        self.busy_s += compute_s * num_rounds
        self._period_busy_s += compute_s * num_rounds
        period_s = self._events.now - self._period_start
        if period_s >= _LOAD_PERIOD_S:
            self._load = min(self._period_busy_s / period_s, _FULL)
            self._period_start, self._period_busy_s = self._events.now, 0.0
        return compute_s

    def _take(self, part: _Part) -> None:
        self._queue.append(part)
        if not self._is_busy:
            self._start()

    def _start(self) -> None:
        now, batch = self._events.now, self._queue
        self._queue = []
        num_sessions = sum(part.num_sessions for part in batch)
        num_tokens = max(part.num_tokens for part in batch)
        seconds = float(self._curve.seconds(num_sessions, num_tokens))
        self._is_busy = True
        self.busy_s += seconds
        self._events.at(now + seconds, lambda: self._end(batch, now, seconds))

    def _end(self, batch: list[_Part], started_s: float, seconds: float) -> None:
        self._is_busy = False
        if self._queue:
            self._start()
        back_s = self._events.now + self._network_s / 2
        for part in batch:
            answer = DraftAnswer(seconds, started_s - part.arrived_s)
            self._events.at(back_s, _Call(part.answer, answer))


@dataclass(frozen=True, slots=True)
class _Call:
    """``answer(value)``, later."""

    answer: Callable[[DraftAnswer], None]
    value: DraftAnswer

    def __call__(self) -> None:
        self.answer(self.value)
