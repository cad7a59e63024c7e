"""What is asked of a fleet: a trace, steps of load, or users who wait for their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.simulation.job import Job


class Lengths(Protocol):
    """A request of a trace; ``cluster.bench.arrival_trace.Arrival`` is one."""

    @property
    def arrival_s(self) -> float: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...


@dataclass(frozen=True)
class ClosedLoop:
    """So many users, each with one request at a time, for a while.

    Their first requests are of different lengths, so that they do not end together.
    """

    concurrency: int
    num_prompt_tokens: int
    num_output_tokens: int
    duration_s: float
    warm_up_s: float = 0.0

    def first_jobs(self) -> list[Job]:
        """One for each user."""
        return [
            self.job(user, user, max(self.num_output_tokens * (user + 1) // self.concurrency, 1))
            for user in range(self.concurrency)
        ]

    def job(self, number: int, user: int, num_output_tokens: int | None = None) -> Job:
        """A user's request; its time is the moment that it is sent."""
        count = self.num_output_tokens if num_output_tokens is None else num_output_tokens
        return Job(number, 0.0, self.num_prompt_tokens, count, user)


@dataclass(frozen=True)
class LoadStep:
    """Requests that come at random, at one rate for a while."""

    duration_s: float
    requests_per_second: float


def trace_jobs(
    trace: Sequence[Lengths], *, repeat: int = 1, rate_scale: float = 1.0
) -> Iterator[Job]:
    """A trace's requests, so many times one behind the other, and so many times as often.

    Args:
        trace: at least one request, in the order of arrival.
        repeat: at least 1.
        rate_scale: above 1 time passes faster, with the same requests.
    """
    span_s = trace[-1].arrival_s * (1 + 1 / max(len(trace) - 1, 1))
    number = 0
    for turn in range(repeat):
        for entry in trace:
            yield Job(
                number,
                (turn * span_s + entry.arrival_s) / rate_scale,
                max(entry.num_prompt_tokens, 1),
                max(entry.num_output_tokens, 1),
            )
            number += 1


def step_jobs(
    steps: Sequence[LoadStep], *, num_prompt_tokens: int, num_output_tokens: int, seed: int
) -> Iterator[Job]:
    """Requests of one size that come at random (a Poisson process), at the rate of each step."""
    rng = np.random.default_rng(seed)
    number, start_s = 0, 0.0
    for step in steps:
        time_s = start_s
        while step.requests_per_second > 0:
            time_s += float(rng.exponential(1.0 / step.requests_per_second))
            if time_s >= start_s + step.duration_s:
                break
            yield Job(number, time_s, num_prompt_tokens, num_output_tokens)
            number += 1
        start_s += step.duration_s
