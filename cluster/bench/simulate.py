"""What ``dspark simulate`` answers: a frontier, how many drafters, one run in detail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from cluster.section import Section
from cluster.simulation.fleet import Fleet
from cluster.simulation.job import Job
from cluster.simulation.simulation import Detail, FleetSimulation
from cluster.simulation.workload import ClosedLoop

ADAPTIVE = "adaptive"
PLAIN = "plain"

Workload = ClosedLoop | Callable[[], Iterable[Job]]


def simulate(fleet: Fleet, workload: Workload, detail: Detail | None = None) -> dict[str, Any]:
    """Runs one workload on a fleet; returns its figures (``cluster.simulation.figures``)."""
    simulation = FleetSimulation(fleet, detail)
    if isinstance(workload, ClosedLoop):
        return simulation.run_closed(workload)
    return simulation.run_open(workload())


def frontier_rows(
    fleet: Fleet, loops: Sequence[ClosedLoop], note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Throughput over load of adaptive speculation, of none, and of each fixed amount of it.

    Returns:
        A row for each loop, as ``dspark bench frontier`` has them: ``concurrency``, ``adaptive``,
        ``plain``, ``fixed`` (by the number of draft tokens, as text) and ``budget``.
    """
    acceptance = fleet.config.acceptance
    block = 0 if fleet.drafter is None or acceptance is None else len(acceptance.conditional)
    ways = [ADAPTIVE, PLAIN, *(str(tokens) for tokens in range(1, block + 1))]
    rows = []
    for loop in loops:
        found = {way: simulate(fleet_of_way(fleet, way), loop) for way in ways}
        adaptive = found[ADAPTIVE]
        rows.append(
            {
                "concurrency": loop.concurrency,
                "adaptive": adaptive["throughput"],
                "plain": found[PLAIN]["throughput"],
                "fixed": {way: found[way]["throughput"] for way in ways if way != ADAPTIVE},
                "per_device": adaptive["throughput_per_device"],
                "budget": adaptive["budget"],
                "acceptance_length": adaptive["acceptance_length"],
                "tokens_per_second_per_user": adaptive["tokens_per_second_per_user"]["p50"],
                "modes": adaptive["modes"],
                "flips": adaptive["flips"],
            }
        )
        row = rows[-1]
        note(f"{loop.concurrency} requests: {row['adaptive']} adaptive, {row['plain']} plain")
    return rows


def drafter_rows(
    fleet: Fleet,
    counts: Sequence[int],
    workload: Workload,
    detail: Detail,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The same workload with pools of fixed sizes, a row for each."""
    rows = []
    for count in counts:
        found = simulate(fleet_of_pool(fleet, count), workload, detail)
        rows.append(
            {
                "drafters": count,
                "throughput": found["throughput"],
                "throughput_per_device": found["throughput_per_device"],
                "tokens_per_second_per_user": found["tokens_per_second_per_user"]["p50"],
                "first_token_p95_s": found["first_token_s"]["p95"],
                "inter_chunk_p95_s": found["inter_chunk_s"]["p95"],
                "budget": found["budget"],
                "acceptance_length": found["acceptance_length"],
                "plain_share": found["modes"].get(PLAIN, 0.0) if found["modes"] else 1.0,
                "drafter_utilisation": found["drafter_utilisation"],
            }
        )
        note(f"{count} drafters: {rows[-1]['throughput']} tokens/s")
    return rows


def fleet_of_way(fleet: Fleet, way: str) -> Fleet:
    """The fleet with ``adaptive`` speculation, ``plain``, or so many tokens in every pass."""
    if way == ADAPTIVE:
        return fleet
    if way == PLAIN:
        return _changed(fleet, drafter=None)
    speculative = _updated(
        fleet.config.speculative,
        scheduler="full",
        switching="always",
        grouping="off",
        num_speculative_tokens=int(way),
    )
    return _changed(fleet, speculative=speculative)


def fleet_of_pool(fleet: Fleet, count: int) -> Fleet:
    """The fleet with so many drafters all the time."""
    if fleet.config.drafter is None:
        return fleet
    drafter = _updated(fleet.config.drafter, min_replicas=count, max_replicas=count)
    return _changed(fleet, drafter=drafter)


def fleet_of_size(fleet: Fleet, num_replicas: int) -> Fleet:
    """The fleet with so many target replicas."""
    return _changed(fleet, target=_updated(fleet.config.target, num_replicas=num_replicas))


def _changed(fleet: Fleet, **parts: Any) -> Fleet:
    return replace(fleet, config=_updated(fleet.config, **parts))


def _updated(section: Section, **values: Any) -> Any:
    return section.model_copy(update=values)
