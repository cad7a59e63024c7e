"""Samples by metric, in the form that prometheus_client writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family

from cluster.metrics.catalogue import METRICS, Kind, Metric

_FAMILIES = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


class Families:
    """The samples of one scrape; all metrics of the catalogue, also those without any.

    Args:
        model_name: the first label of every sample.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._families = {
            metric: _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels)
            for metric in METRICS
        }

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        """A counter's or a gauge's sample; ``labels`` are the values behind the model's name."""
        self._families[metric].add_metric([self._model_name, *labels], value)

    def add_histogram(
        self,
        metric: Metric,
        bounds: Sequence[float],
        counts: Sequence[int],
        total: float,
        *labels: str,
    ) -> None:
        """A histogram's samples.

        Args:
            counts: one more than ``bounds``, each of its own bucket alone.
            total: sum of the values.
        """
        names = [*(f"{float(bound)}" for bound in bounds), "+Inf"]
        buckets = list(zip(names, accumulate(counts), strict=True))
        self._families[metric].add_metric([self._model_name, *labels], buckets, total)

    def __iter__(self) -> Iterator[Family]:
        return iter(self._families.values())
