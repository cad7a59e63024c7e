"""The figures of a simulated fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cluster.simulation.statistics import percentiles

if TYPE_CHECKING:
    from cluster.simulation.simulation import FleetSimulation


def fleet_figures(simulation: FleetSimulation, processor_s: float) -> dict[str, Any]:
    """What a simulation has found, as JSON values.

    Rates are tokens per second, other times seconds; all of it of what came behind the warm-up.
    """
    statistics, pool = simulation.statistics, simulation.pool
    simulated_s = simulation.events.now
    span_s = max(simulated_s - statistics.since_s, 1e-9)
    num_rounds = max(statistics.num_rounds, 1)
    modes = simulation.modes()
    total_s = sum(modes.values())
    return {
        "simulated_s": round(simulated_s, 3),
        "processor_s": round(processor_s, 3),
        "requests": statistics.num_ended,
        "refused": statistics.num_refused,
        "preemptions": sum(r.queue.num_preemptions for r in simulation.replicas),
        "output_tokens": statistics.num_output_tokens,
        "throughput": round(statistics.num_output_tokens / span_s, 2),
        "devices": round(_num_devices(simulation), 2),
        "throughput_per_device": round(
            statistics.num_output_tokens / span_s / _num_devices(simulation), 2
        ),
        "tokens_per_second_per_user": percentiles(statistics.rates),
        "first_token_s": percentiles(statistics.first_token_s),
        "queue_s": percentiles(statistics.queue_s),
        "inter_chunk_s": statistics.gap_percentiles(),
        "acceptance_length": round(1 + statistics.num_accepted / num_rounds, 3),
        "budget": round(statistics.num_verified / num_rounds, 3),
        "budget_by_load": statistics.budget_by_load(),
        "modes": {mode: round(s / total_s, 4) for mode, s in modes.items()} if total_s else {},
        "flips": simulation.num_flips(),
        "drafters_mean": round(pool.ready_s / max(simulated_s, 1e-9), 3),
        "drafter_utilisation": round(pool.busy_s / max(pool.ready_s, 1e-9), 4),
        "drafter_changes": [
            {"time_s": round(at_s, 2), "wanted": wanted, "ready": ready, "reason": reason}
            for at_s, wanted, ready, reason in pool.log
        ],
        "timeline": statistics.timeline,
    }


def _num_devices(simulation: FleetSimulation) -> float:
    """Of replicas and of drafters, these on average."""
    target, drafter = simulation.config.target, simulation.config.drafter
    count = float(target.num_replicas * target.devices)
    if drafter is not None and not drafter.is_colocated:
        count += drafter.devices * simulation.pool.ready_s / max(simulation.events.now, 1e-9)
    return count
