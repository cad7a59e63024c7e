"""What is asked of a fleet: a trace, steps of load, or users who wait for their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.simulation.job import Job

_JITTER_S = 60.0


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
    trace: Sequence[Lengths], *, repeat: int = 1, rate_scale: float = 1.0, seed: int = 0
) -> Iterator[Job]:
    """A trace's requests, so many times one behind the other, and so many times as often.

    The first time they come as in the trace. In each repetition every request comes up to a minute
    (of the trace) earlier or later, at random, and over the end of its turn at the beginning, so
    that no second repeats itself.

    Args:
        trace: at least one request, in the order of arrival.
        repeat: at least 1.
        rate_scale: above 1 time passes faster, with the same requests.
        seed: of the repetitions' jitter.
    """
    span_s = trace[-1].arrival_s * (1 + 1 / max(len(trace) - 1, 1))
    times = np.asarray([entry.arrival_s for entry in trace])
    rng = np.random.default_rng(seed)
    number = 0
    for turn in range(repeat):
        order = range(len(trace))
        moved = times
        if turn > 0:
            moved = times + rng.uniform(-_JITTER_S, _JITTER_S, len(times))
            moved = np.mod(moved, max(span_s, 1e-9))
            order = np.argsort(moved, kind="stable").tolist()
        for index in order:
            entry = trace[index]
            yield Job(
                number,
                (turn * span_s + float(moved[index])) / rate_scale,
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
