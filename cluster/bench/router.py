"""Suite ``router``: the time of a choice, and what following prefixes brings.

Conversations over replicas on a clock of their own (``cluster.bench.routed_conversations``): the
router's own objects choose, the engine's own scheduler and caches run, and a pass takes what a line
says. The same conversations are run with each policy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.bench.arrival_trace import Arrival, read_trace
from cluster.bench.conversations import (
    ConversationShape,
    generated_lengths,
    make_conversations,
    repeated_share,
)
from cluster.bench.paired import paired_ratio
from cluster.bench.pick_time import measure_picks
from cluster.bench.report import Report
from cluster.bench.routed_conversations import FleetShape, RoutedRun, run_conversations
from cluster.errors import ConfigError
from cluster.routing.replica_choice import POLICIES

MAX_PICK_US = 100.0
MIN_HIT_RATE_RATIO = 3.0
_TRACE_REQUESTS = 20_000


@dataclass(frozen=True)
class RouterPlan:
    """What is run.

    Attributes:
        trace: CSV whose lengths the conversations have; unset: generated ones.
        runs: of each policy, with other conversations each.
        other_pages: cache sizes that are run once beside that of ``fleet``.
        other_routers: numbers of routers that are run once beside that of ``fleet``.
        pick_replicas, pick_prompts: among how many replicas a choice is timed, and for how many
            prompts.
    """

    conversations: ConversationShape = field(default_factory=ConversationShape)
    fleet: FleetShape = field(default_factory=FleetShape)
    trace: Path | None = None
    runs: int = 3
    other_pages: Sequence[int] = ()
    other_routers: Sequence[int] = ()
    pick_replicas: int = 1000
    pick_prompts: int = 1000


def run(plan: RouterPlan, note: Callable[[str], None]) -> Report:
    """Runs the suite. Raises: DataError; ConfigError: too few conversations."""
    picks = measure_picks(plan.pick_replicas, plan.pick_prompts)
    lengths = (
        read_trace(str(plan.trace), _TRACE_REQUESTS)
        if plan.trace is not None
        else generated_lengths(seed=0)
    )
    rows: list[dict[str, Any]] = []

    def one(fleet: FleetShape, policy: str, seed: int) -> RoutedRun:
        conversations = make_conversations(plan.conversations, lengths, seed)
        result = run_conversations(conversations, fleet, POLICIES[policy], seed)
        if not result.queue_s or not result.first_token_s:
            raise ConfigError(
                "--conversations",
                f"must be more: none of their turns came after {fleet.warm_up_s:g} s and before "
                "the last of them began, and only those are counted",
            )
        row = {
            "policy": policy,
            "pages": fleet.num_pages,
            "routers": fleet.num_routers,
            "run": seed,
            **result.figures(),
            "repeated_share": round(repeated_share(conversations), 4),
        }
        note(" ".join(f"{name} {value}" for name, value in row.items()))
        rows.append(row)
        return result

    runs: dict[str, list[RoutedRun]] = {policy: [] for policy in POLICIES}
    for seed in range(plan.runs):
        for policy in POLICIES:
            runs[policy].append(one(plan.fleet, policy, seed))
    fleets = [replace(plan.fleet, num_pages=pages) for pages in plan.other_pages]
    fleets += [replace(plan.fleet, num_routers=number) for number in plan.other_routers]
    for fleet in fleets:
        for policy in ("prefix", "random"):
            one(fleet, policy, 0)
    figures = {**picks, **_compare(runs, rows[: plan.runs * len(POLICIES)]), "rows": rows}
    figures["lengths"] = _describe(lengths, plan.trace)
    return Report("router", figures, _passed(figures))


def _compare(runs: dict[str, list[RoutedRun]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    hit_rates = {policy: [r.hit_rate for r in results] for policy, results in runs.items()}
    ratio = paired_ratio(hit_rates["prefix"], hit_rates["random"])
    figures: dict[str, Any] = {
        "hit_rate_ratio": ratio["ratio"],
        "hit_rate_ratio_low": ratio["ratio_low"],
    }
    for policy in runs:
        queues = [row["queue_p99_ms"] for row in rows if row["policy"] == policy]
        figures[f"hit_rate_{policy}"] = round(statistics.median(hit_rates[policy]), 4)
        figures[f"queue_p99_ms_{policy}"] = round(statistics.median(queues), 1)
    return figures


def _passed(figures: dict[str, Any]) -> bool:
    return (
        figures["pick_us"] < MAX_PICK_US
        and figures["hit_rate_ratio_low"] >= MIN_HIT_RATE_RATIO
        and figures["queue_p99_ms_prefix"] <= figures["queue_p99_ms_random"]
    )


def _describe(lengths: Sequence[Arrival], trace: Path | None) -> str:
    prompt = statistics.median(length.num_prompt_tokens for length in lengths)
    output = statistics.median(length.num_output_tokens for length in lengths)
    name = trace.name if trace is not None else "generated"
    return f"{name}: medians {prompt:g} prompt and {output:g} output tokens"
