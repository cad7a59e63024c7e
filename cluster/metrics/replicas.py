"""Metrics of target replicas and of the drafters they know, from the replicas' reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from cluster.metrics import catalogue
from cluster.metrics.families import Families
from cluster.v1.inference_pb2 import DrafterStatus, ReplicaStatus

_STATES = ("connecting", "ready", "draining", "mismatched", "lost")
_DRAFTER_STATES = (
    *("connecting", "ready", "open", "half-open", "quarantined", "mismatched", "lost"),
)
_MODES = ("plain", "speculative", "grouped")
_REASONS = ("unknown", "goodput", "impossible", "no_drafter", "not_configured")


def add_replicas(families: Families, statuses: Iterable[ReplicaStatus]) -> None:
    """Adds what a router knows of its replicas.

    A replica's own samples are added where the router is the one that exports them, and its last
    report is of now.
    """
    states = Counter(dict.fromkeys(_STATES, 0))
    for status in statuses:
        states[status.state] += 1
        if status.is_exporter and status.state in ("ready", "draining"):
            _add_replica(families, status)
    for state, count in states.items():
        families.add(catalogue.REPLICAS, count, state)


def _add_replica(families: Families, status: ReplicaStatus) -> None:
    name, metrics, stats = status.replica_id, status.metrics, status.speculation
    cache = status.prefix_cache
    for metric, value in (
        (catalogue.RUNNING, status.num_running),
        (catalogue.WAITING, status.num_waiting),
        (catalogue.KV_USAGE, status.kv_cache_usage),
        (catalogue.PREFIX_QUERIES, cache.num_queried_tokens),
        (catalogue.PREFIX_HITS, cache.num_hit_tokens),
        (catalogue.PREEMPTIONS, metrics.num_preemptions),
        (catalogue.PROMPT_TOKENS, metrics.num_prompt_tokens),
        (catalogue.OUTPUT_TOKENS, status.num_output_tokens),
        (catalogue.DRAFTS, stats.num_drafts),
        (catalogue.DRAFT_TOKENS, stats.num_draft_tokens),
        (catalogue.ACCEPTED_TOKENS, stats.num_accepted_tokens),
        (catalogue.FLIPS, metrics.num_flips),
        (catalogue.LATE, stats.num_late_proposals),
        (catalogue.STALE, stats.num_stale_proposals),
        (catalogue.MALFORMED, stats.num_malformed_proposals),
        (catalogue.CALIBRATION_DRIFT, status.calibration_drift),
        (catalogue.DRAFTER_DEMAND, metrics.drafter_demand),
        (catalogue.DRAFT_QUEUE, metrics.draft_queue_seconds),
        (catalogue.DRAFT_NETWORK, metrics.draft_network_seconds),
        (catalogue.FREE_TOKENS, status.num_free_tokens),
        (catalogue.CACHED_PAGES, cache.num_cached_pages),
        (catalogue.EVICTED_PAGES, cache.num_evicted_pages),
        (catalogue.QUEUED_TOKENS, status.num_queued_tokens),
    ):
        families.add(metric, value, name)
    if status.HasField("calibration_error"):
        families.add(catalogue.CALIBRATION_ERROR, status.calibration_error, name)
    for position, count in enumerate(stats.num_accepted_tokens_per_pos):
        families.add(catalogue.ACCEPTED_TOKENS_PER_POS, count, name, str(position))
    budgets = metrics.num_requests_by_budget or [0]
    families.add_histogram(
        catalogue.BUDGET,
        range(len(budgets)),
        [*budgets, 0],
        sum(budget * count for budget, count in enumerate(budgets)),
        name,
    )
    for mode in _MODES:
        families.add(catalogue.MODE, metrics.speculation_mode == mode, name, mode)
        families.add(catalogue.MODE_SECONDS, metrics.seconds_in_mode.get(mode, 0.0), name, mode)
    for reason in _REASONS:
        families.add(catalogue.REASON, metrics.speculation_reason_code == reason, name, reason)
    families.add(catalogue.GOODPUT, metrics.goodput_plain, name, "plain")
    families.add(catalogue.GOODPUT, metrics.goodput, name, "speculative")
    _add_drafters(families, name, status.drafters)
    _add_pace(families, status, name, "")


def _add_drafters(families: Families, name: str, drafters: Iterable[DrafterStatus]) -> None:
    states = Counter(dict.fromkeys(_DRAFTER_STATES, 0))
    for drafter in drafters:
        states[drafter.state] += 1
        families.add(catalogue.DRAFTER_STATE, 1, name, drafter.drafter_id, drafter.state)
        for outcome, count in sorted(drafter.num_rounds.items()):
            families.add(catalogue.ROUNDS, count, name, drafter.drafter_id, outcome)
        if drafter.HasField("round_trip_seconds"):
            trips = drafter.round_trip_seconds
            families.add_histogram(
                catalogue.ROUND_TRIP,
                trips.bounds,
                trips.counts,
                trips.sum,
                name,
                drafter.drafter_id,
            )
        _add_pace(families, drafter, name, drafter.drafter_id)
    for state, count in states.items():
        families.add(catalogue.DRAFTERS, count, name, state)


def _add_pace(
    families: Families, status: ReplicaStatus | DrafterStatus, name: str, drafter: str
) -> None:
    if status.HasField("paced"):
        families.add(catalogue.PACED_PASSES, status.paced.num_passes, name, drafter)
        families.add(catalogue.PACED_OVERRUNS, status.paced.num_overruns, name, drafter)
