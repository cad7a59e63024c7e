"""Metrics of one router: what it measures itself, and what its replicas report."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

import cluster
from cluster.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
    RequestCancelledError,
)
from cluster.histogram import Histogram
from cluster.metrics import catalogue
from cluster.metrics.catalogue import Metric
from cluster.metrics.families import Families
from cluster.metrics.replicas import add_replicas
from cluster.v1.inference_pb2 import GenerateResponse, ReplicaStatus

_HISTOGRAMS = (
    catalogue.TTFT,
    catalogue.ITL,
    catalogue.E2E,
    catalogue.QUEUE_TIME,
    catalogue.PREFILL_TIME,
    catalogue.DECODE_TIME,
    catalogue.TIME_PER_TOKEN,
    catalogue.REQUEST_PROMPT_TOKENS,
    catalogue.REQUEST_OUTPUT_TOKENS,
    catalogue.MAX_OUTPUT_TOKENS,
)
# ``FinishReason``'s values, and how vLLM writes the others.
_FINISHED = {1: "stop", 2: "length"}
_ABORT, _ERROR = "abort", "error"
_REASONS = (
    (InvalidRequestError, "invalid"),
    (QueueFullError, "queue_full"),
    (ReplicaLostError, "replica_lost"),
    (DeadlineExceededError, "deadline"),
    ((RequestCancelledError, asyncio.CancelledError, GeneratorExit), "cancelled"),
    (BaseException, "internal"),
)
_ABORTS = ("cancelled", "deadline")


@dataclass(frozen=True, kw_only=True)
class RouterState:
    """What of a router is as it is at a scrape.

    Attributes:
        refusals: counts by reason.
        num_restarts: choices that went on elsewhere.
    """

    replicas: Iterable[ReplicaStatus] = ()
    refusals: Mapping[str, int] = field(default_factory=dict)
    num_active_requests: int = 0
    num_queued_tokens: int = 0
    num_restarts: int = 0


class RouterMetrics(Collector):
    """Counts a router's requests, and writes what Prometheus reads.

    Requests belong to one event loop; a scrape may come from any thread.

    Args:
        model_name: the label of every sample.
        state: called at each scrape.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        model_name: str,
        state: Callable[[], RouterState],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model_name = model_name
        self._state = state
        self._clock = clock
        self._histograms = {metric: Histogram(metric.bounds) for metric in _HISTOGRAMS}
        self._finished: Counter[str] = Counter(
            dict.fromkeys((*_FINISHED.values(), _ABORT, _ERROR), 0)
        )
        self._failed: Counter[str] = Counter(dict.fromkeys((name for _, name in _REASONS), 0))
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def request(self) -> RequestMeter:
        """A request that begins now; a context manager that lasts as long as it does."""
        return RequestMeter(self._histograms, self._finished, self._failed, self._clock)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Family]:
        """For ``registry``."""
        families = Families(self._model_name)
        state = self._state()
        add_replicas(families, state.replicas)
        for metric, counts in (
            (catalogue.SUCCESS, self._finished),
            (catalogue.FAILED, self._failed),
            (catalogue.REFUSALS, state.refusals),
        ):
            for reason, count in list(counts.items()):
                families.add(metric, count, reason)
        for metric, histogram in self._histograms.items():
            counts_now = list(histogram.counts)
            families.add_histogram(metric, histogram.bounds, counts_now, histogram.sum)
        families.add(catalogue.RESTARTS, state.num_restarts)
        families.add(catalogue.ACTIVE, state.num_active_requests)
        families.add(catalogue.ADMITTED_TOKENS, state.num_queued_tokens)
        families.add(catalogue.BUILD, 1, cluster.__version__)
        return iter(families)


class RequestMeter:
    """One request, from when the router has it until it has ended."""

    def __init__(
        self,
        histograms: Mapping[Metric, Histogram],
        finished: Counter[str],
        failed: Counter[str],
        clock: Callable[[], float],
    ) -> None:
        self._histograms = histograms
        self._finished = finished
        self._failed = failed
        self._clock = clock
        self._began = clock()
        self._first: dict[int, float] = {}  # when each choice had its first tokens
        self._last: dict[int, float] = {}  # and its last
        self._num_open = 0
        self._max_output_tokens = 0

    def begin(self, num_choices: int) -> None:
        """The request was admitted."""
        self._num_open = num_choices

    def chunk(self, chunk: GenerateResponse) -> None:
        """A piece for the client is there."""
        now = self._clock()
        if chunk.token_ids:
            last = self._last.get(chunk.choice_index)
            if last is None:
                self._histograms[catalogue.TTFT].observe(now - self._began)
                self._first[chunk.choice_index] = now
            else:
                self._histograms[catalogue.ITL].observe(now - last)
            self._last[chunk.choice_index] = now
        if chunk.finish_reason:
            self._num_open -= 1
            self._finished[_FINISHED[chunk.finish_reason]] += 1
            self._finish(chunk, now)

    def _finish(self, chunk: GenerateResponse, now: float) -> None:
        """The last piece of a choice is there."""
        usage, index = chunk.usage, chunk.choice_index
        num_tokens = usage.completion_tokens
        first, last = self._first.get(index, now), self._last.get(index, now)
        for metric, value in (
            (catalogue.E2E, now - self._began),
            (catalogue.QUEUE_TIME, usage.queue_seconds),
            # The router's clock and the replica's span: their difference may be below 0 by a bit.
            (catalogue.PREFILL_TIME, max(first - self._began - usage.queue_seconds, 0.0)),
            (catalogue.DECODE_TIME, last - first),
            (catalogue.REQUEST_PROMPT_TOKENS, usage.prompt_tokens),
            (catalogue.REQUEST_OUTPUT_TOKENS, num_tokens),
        ):
            self._histograms[metric].observe(value)
        if num_tokens > 1:
            self._histograms[catalogue.TIME_PER_TOKEN].observe((last - first) / (num_tokens - 1))
        self._max_output_tokens = max(self._max_output_tokens, num_tokens)
        if self._num_open == 0:
            self._histograms[catalogue.MAX_OUTPUT_TOKENS].observe(self._max_output_tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is None:
            return
        reason = next(name for kinds, name in _REASONS if issubclass(exc_type, kinds))
        if exc_type is GeneratorExit and self._num_open == 0 and self._last:
            return  # whoever reads left behind the last piece
        self._failed[reason] += 1
        self._finished[_ABORT if reason in _ABORTS else _ERROR] += self._num_open
