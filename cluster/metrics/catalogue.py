"""Every metric: its name, kind and labels, and what it says. ``docs/metrics.md`` lists them.

Names that vLLM has are vLLM's, with vLLM's meaning; what is ours begins with ``dspark:``. All have
the label ``model_name``. Those of one replica have ``replica`` too.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

MODEL = "model_name"


class Kind(enum.StrEnum):
    """As Prometheus calls them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without a counter's ``_total``.
        labels: ``model_name`` is the first.
        bounds: of a histogram's buckets, where they are not a replica's choice.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    bounds: tuple[float, ...] = ()

    @property
    def sample_names(self) -> tuple[str, ...]:
        """The names in a scrape, and so in expressions."""
        if self.kind is Kind.COUNTER:
            return (f"{self.name}_total",)
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


METRICS: list[Metric] = []


def _add(kind: Kind, name: str, text: str, *labels: str, bounds: tuple[float, ...] = ()) -> Metric:
    metric = Metric(name, kind, text, (MODEL, *labels), bounds)
    METRICS.append(metric)
    return metric


def _counter(name: str, text: str, *labels: str) -> Metric:
    return _add(Kind.COUNTER, name, text, *labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return _add(Kind.GAUGE, name, text, *labels)


def _histogram(name: str, text: str, *labels: str, bounds: tuple[float, ...] = ()) -> Metric:
    return _add(Kind.HISTOGRAM, name, text, *labels, bounds=bounds)


_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80),
)

# Of a replica, as it reports them.
RUNNING = _gauge("vllm:num_requests_running", "Requests in the batch.", "replica")
WAITING = _gauge("vllm:num_requests_waiting", "Requests in the replica's queue.", "replica")
KV_USAGE = _gauge(
    "vllm:kv_cache_usage_perc", "Share of KV pages that running requests hold, 0 to 1.", "replica"
)
PREFIX_QUERIES = _counter(
    "vllm:prefix_cache_queries", "Tokens that the prefix cache was asked for.", "replica"
)
PREFIX_HITS = _counter("vllm:prefix_cache_hits", "How many of them it had.", "replica")
PREEMPTIONS = _counter(
    "vllm:num_preemptions", "Requests that lost their pages and were computed again.", "replica"
)
PROMPT_TOKENS = _counter(
    "vllm:prompt_tokens", "Prompt tokens of requests that have an output.", "replica"
)
OUTPUT_TOKENS = _counter("vllm:generation_tokens", "Output tokens.", "replica")
DRAFTS = _counter(
    "vllm:spec_decode_num_drafts", "Rounds of a request that verified a draft token.", "replica"
)
DRAFT_TOKENS = _counter(
    "vllm:spec_decode_num_draft_tokens", "Draft tokens that were verified.", "replica"
)
ACCEPTED_TOKENS = _counter(
    "vllm:spec_decode_num_accepted_tokens", "Draft tokens that were accepted.", "replica"
)
ACCEPTED_TOKENS_PER_POS = _counter(
    "vllm:spec_decode_num_accepted_tokens_per_pos",
    "Draft tokens that were accepted, by position in their block.",
    "replica",
    "position",
)
BUDGET = _histogram(
    "dspark:request_budget_tokens",
    "Draft tokens of one request that a pass with output verified.",
    "replica",
)
MODE = _gauge(
    "dspark:speculation_mode",
    "1 for the mode in force: plain, speculative or grouped.",
    "replica",
    "mode",
)
REASON = _gauge(
    "dspark:speculation_reason",
    "1 for why it is in force: unknown, goodput, impossible, no_drafter or not_configured.",
    "replica",
    "reason",
)
FLIPS = _counter("dspark:speculation_flips", "Times that speculation went off or on.", "replica")
MODE_SECONDS = _counter(
    "dspark:speculation_mode_seconds", "Time spent in each mode.", "replica", "mode"
)
GOODPUT = _gauge(
    "dspark:expected_goodput_tokens_per_second",
    "Tokens per second that the cost model expects, by mode: plain or speculative.",
    "replica",
    "mode",
)
LATE = _counter(
    "dspark:late_proposals", "Proposals that did not come in time; decoded plainly.", "replica"
)
STALE = _counter("dspark:stale_proposals", "Proposals that rested on another length.", "replica")
MALFORMED = _counter(
    "dspark:malformed_proposals", "Answers of drafters that broke the protocol.", "replica"
)
CALIBRATION_ERROR = _gauge(
    "dspark:calibration_error",
    "By how much confidences as served are off, 0 to 1; missing until enough was verified.",
    "replica",
)
CALIBRATION_DRIFT = _gauge(
    "dspark:calibration_drift",
    "Largest factor by which online calibration differs from the offline fit, 1 or more.",
    "replica",
)
DRAFTER_DEMAND = _gauge(
    "dspark:drafter_demand", "Drafters that the replica's rounds keep busy.", "replica"
)
DRAFT_QUEUE = _gauge(
    "dspark:draft_queue_seconds", "Expected wait of a round on its drafter.", "replica"
)
DRAFT_NETWORK = _gauge(
    "dspark:draft_network_seconds",
    "A round's way there and back: its round trip less the drafter's own time.",
    "replica",
)
DRAFTERS = _gauge(
    "dspark:drafters",
    "Drafters that the replica knows, by state: connecting, ready, open (left alone by the "
    "breaker), half-open (one round is tried), quarantined, mismatched, lost.",
    "replica",
    "state",
)
DRAFTER_STATE = _gauge(
    "dspark:drafter_state", "1, for the state of each drafter.", "replica", "drafter", "state"
)
ROUNDS = _counter(
    "dspark:drafter_rounds",
    "Rounds by outcome: answered, late, dropped (not sent, the drafter being behind) or lost.",
    "replica",
    "drafter",
    "outcome",
)
ROUND_TRIP = _histogram(
    "dspark:drafter_round_trip_seconds", "From sending a round to its answer.", "replica", "drafter"
)
FREE_TOKENS = _gauge(
    "dspark:kv_cache_free_tokens", "Tokens that fit into pages that no request holds.", "replica"
)
CACHED_PAGES = _gauge(
    "dspark:prefix_cached_pages", "Pages that the prefix cache can find.", "replica"
)
EVICTED_PAGES = _counter(
    "dspark:prefix_evicted_pages", "Pages that it could find and that were taken.", "replica"
)
QUEUED_TOKENS = _gauge(
    "dspark:queued_tokens", "Tokens to be computed, expected outputs included.", "replica"
)
PACED_PASSES = _counter(
    "dspark:paced_passes",
    "Passes that keep a device profile's time; `drafter` is empty for the target's.",
    "replica",
    "drafter",
)
PACED_OVERRUNS = _counter(
    "dspark:paced_overruns", "How many of them really took longer.", "replica", "drafter"
)

# Of the router that is scraped.
SUCCESS = _counter(
    "vllm:request_success",
    "Choices that ended: stop, length, abort (the client left, or its deadline passed) or error.",
    "finished_reason",
)
TTFT = _histogram(
    "vllm:time_to_first_token_seconds",
    "From the request to its first token, at the router.",
    bounds=(
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
        *(20, 40, 80, 160, 640, 2560),
    ),
)
ITL = _histogram(
    "vllm:inter_token_latency_seconds",
    "Between two pieces of a choice that follow each other; a piece has one token or several.",
    bounds=_TOKEN_SECONDS,
)
E2E = _histogram(
    "vllm:e2e_request_latency_seconds",
    "From the request to the end of each choice that finished.",
    bounds=_SECONDS,
)
QUEUE_TIME = _histogram(
    "vllm:request_queue_time_seconds",
    "What a choice that finished had waited on its replica before anything was computed.",
    bounds=_SECONDS,
)
PREFILL_TIME = _histogram(
    "vllm:request_prefill_time_seconds",
    "Of a choice that finished: to its first token, less what it had waited on its replica.",
    bounds=_SECONDS,
)
DECODE_TIME = _histogram(
    "vllm:request_decode_time_seconds",
    "Of a choice that finished: from its first token to its last.",
    bounds=_SECONDS,
)
TIME_PER_TOKEN = _histogram(
    "vllm:request_time_per_output_token_seconds",
    "Of a choice that finished with two tokens or more: its decode time by token behind the first.",
    bounds=_TOKEN_SECONDS,
)
REQUEST_PROMPT_TOKENS = _histogram(
    "vllm:request_prompt_tokens", "Of choices that finished.", bounds=_TOKENS
)
REQUEST_OUTPUT_TOKENS = _histogram(
    "vllm:request_generation_tokens", "Of choices that finished.", bounds=_TOKENS
)
MAX_OUTPUT_TOKENS = _histogram(
    "vllm:request_max_num_generation_tokens",
    "Of the longest choice of a request that finished.",
    bounds=_TOKENS,
)
FAILED = _counter(
    "dspark:requests_failed",
    "Requests that failed: invalid, queue_full, replica_lost, deadline, cancelled or internal.",
    "reason",
)
RESTARTS = _counter(
    "dspark:request_restarts", "Choices that lost their replica and went on on another one."
)
REFUSALS = _counter(
    "dspark:refusals",
    "What was refused before it was a request: handshake, no_key, unknown_key, wrong_peer, "
    "request_rate, concurrency, queued_tokens, slow_reader, slow_sender.",
    "reason",
)
ACTIVE = _gauge("dspark:router_active_requests", "Requests that have not ended.")
ADMITTED_TOKENS = _gauge("dspark:router_queued_tokens", "Tokens that they still need, at most.")
REPLICAS = _gauge(
    "dspark:replicas",
    "Target replicas that the router knows, by state: connecting, ready, draining, mismatched, "
    "lost.",
    "state",
)
BUILD = _gauge("dspark:build_info", "1, for the router's version.", "version")
