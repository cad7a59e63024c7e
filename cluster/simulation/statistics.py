"""What is counted while a fleet is simulated, and the figures of it."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.simulation.job import Job
from cluster.simulation.passes import SimulatedPass

_PERCENTILES = (50, 95, 99)
_DIGITS = 5
# Gaps are counted in bins that are 2% wide, from 0.1 ms to 1000 s.
_GAP_BOUNDS: list[float] = np.exp(np.arange(np.log(1e-4), np.log(1e3), np.log(1.02))).tolist()


@dataclass
class Statistics:
    """Counts from ``since_s`` (simulated seconds) on; what came before is warm-up.

    Attributes:
        timeline: rows of the fleet's state over time (``FleetSimulation`` adds them).
    """

    since_s: float = 0.0
    num_output_tokens: int = 0
    num_steps: int = 0
    num_rounds: int = 0
    num_verified: int = 0
    num_accepted: int = 0
    num_ended: int = 0
    num_refused: int = 0
    first_token_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    by_load: dict[int, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    timeline: list[dict[str, Any]] = field(default_factory=list)
    _gaps: list[int] = field(default_factory=lambda: [0] * (len(_GAP_BOUNDS) + 1))

    def add_gap(self, seconds: float, times: int = 1) -> None:
        """A time between two chunks of a request, that is counted so many times."""
        self._gaps[bisect_left(_GAP_BOUNDS, seconds)] += times

    def add_pass(self, done: SimulatedPass, now: float) -> None:
        """Counts a pass that has ended, before its rows have their tokens."""
        outcome = done.outcome
        num_rounds, num_rows = outcome.num_rounds, len(outcome.gained)
        if now < self.since_s or not num_rows:
            return
        for sequence in done.rows:
            self.add_gap(done.first_end_s - sequence.last_s)
        if num_rounds > 1:
            self.add_gap(done.cycle_s, num_rows * (num_rounds - 1))
        num_verified = num_rounds * outcome.num_guesses
        self.num_steps += num_rounds
        self.num_rounds += num_rounds * num_rows
        self.num_verified += num_verified
        self.num_accepted += sum(outcome.gained) - num_rounds * num_rows
        self.add_budget(num_rows, num_verified, num_rounds)

    def add_tokens(self, num_tokens: int, now: float) -> None:
        """Counts output tokens."""
        if now >= self.since_s:
            self.num_output_tokens += num_tokens

    def add_job(self, job: Job) -> None:
        """Counts a request that has ended."""
        if job.ended_s < self.since_s:
            return
        self.num_ended += 1
        if job.arrival_s < self.since_s:
            return
        self.first_token_s.append(job.first_token_s - job.arrival_s)
        self.queue_s.append(job.started_s - job.arrival_s)
        if job.ended_s > job.first_token_s:
            self.rates.append((job.num_output_tokens - 1) / (job.ended_s - job.first_token_s))

    def add_budget(self, num_requests: int, num_verified: float, num_rounds: int) -> None:
        """Guesses verified in passes of so many requests."""
        entry = self.by_load[num_requests]
        entry[0] += num_verified
        entry[1] += num_rounds * num_requests

    def gap_percentiles(self) -> dict[str, float | None]:
        """Seconds, to 2%."""
        total = sum(self._gaps)
        if total == 0:
            return {f"p{p}": None for p in _PERCENTILES}
        ranks = np.cumsum(self._gaps) / total
        found: dict[str, float | None] = {}
        for p in _PERCENTILES:
            bin = min(int(np.searchsorted(ranks, p / 100)), len(_GAP_BOUNDS) - 1)
            found[f"p{p}"] = round(_GAP_BOUNDS[bin], 6)
        return found

    def budget_by_load(self) -> dict[int, float]:
        """Guesses verified for a request and pass, by requests in the pass."""
        return {
            load: round(verified / counted, 3)
            for load, (verified, counted) in sorted(self.by_load.items())
            if counted > 0
        }


def percentiles(values: list[float]) -> dict[str, float | None]:
    """p50, p95 and p99; ``None`` of nothing."""
    if not values:
        return {f"p{p}": None for p in _PERCENTILES}
    found = np.percentile(np.asarray(values), _PERCENTILES)
    return {f"p{p}": round(float(v), _DIGITS) for p, v in zip(_PERCENTILES, found, strict=True)}
