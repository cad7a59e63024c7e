"""Suite ``frontier``: throughput over load, adaptive speculation against every fixed amount of it.

Three engines in this process, one adaptive, one with a fixed amount, one without speculation, and
the drafter of the first two in another one over gRPC. At each concurrency the ways to speculate
take turns (``cluster.bench.turns``), in another order each time, for a while each: so what slows
the machine for a while hits all of them.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.bench.paired import paired_ratio
from cluster.bench.report import Report
from cluster.bench.turns import ClosedLoop, Side, Turn, TurnShape, engines, pace_label
from cluster.config import ClusterConfig, SpeculativeConfig

ADAPTIVE = "adaptive"
PLAIN = "plain"
_FIXED_BAR = 0.97
_PLAIN_BAR = 0.98
_LEAST_PROMPTS = 64  # what a few requests are about would decide it all
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class FrontierShape(TurnShape):
    """What is measured.

    Attributes:
        concurrencies: requests under way at any time.
        fixed: numbers of draft tokens that are always drafted and verified; 0 is no speculation.
    """

    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    fixed: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)


def run(values: dict[str, Any], shape: FrontierShape, note: Callable[[str], None]) -> Report:
    """Runs the suite.

    It passes where adaptive throughput is at least 0.97 times that of the best fixed number (which
    is chosen on the other half of the turns) and 0.98 times that without speculation, at every
    concurrency and with the lower end of the 95% interval.

    Args:
        values: ``args`` of a configuration with a ``speculative`` part.

    Raises:
        DsparkError: target or drafter cannot be served so.
    """
    config = ClusterConfig.parse(values)
    if config.speculative is None:
        raise ValueError("there is nothing to draft with")
    count = max(2 * max(shape.concurrencies), _LEAST_PROMPTS)
    prompts = shape.prompts(config.target.model, count)
    rows = []
    with engines(config, values, num_speculating=2) as (adaptive, fixed, plain):
        for concurrency in shape.concurrencies:
            load = ClosedLoop(prompts, concurrency, shape)
            turns = _take_turns(adaptive, fixed, plain, config.speculative, load, shape)
            row = frontier_row(concurrency, turns)
            rows.append(row)
            note(_line(row))
    return Report(
        suite="frontier",
        figures={"rows": rows, "paced": pace_label(config)},
        passed=all(row["passed"] for row in rows),
    )


def frontier_row(concurrency: int, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Figures of one concurrency; turn i of every way was taken at about the same time.

    The best fixed number is chosen on turns of odd index and compared on even ones, and the other
    way round, so that no way is compared where it was lucky.
    """
    throughput = {way: [turn.throughput for turn in of] for way, of in turns.items()}
    fixed = {way: values for way, values in throughput.items() if way != ADAPTIVE}
    ours: list[float] = []
    best: list[float] = []
    chosen = []
    for part in (0, 1):
        chosen_by = {way: sorted(values[1 - part :: 2]) for way, values in fixed.items()}
        way = max(chosen_by, key=lambda name: chosen_by[name][len(chosen_by[name]) // 2])
        chosen.append(way)
        ours += throughput[ADAPTIVE][part::2]
        best += fixed[way][part::2]
    over_fixed = paired_ratio(ours, best)
    over_plain = paired_ratio(throughput[ADAPTIVE], throughput[PLAIN])
    adaptive = turns[ADAPTIVE]
    return {
        "concurrency": concurrency,
        "adaptive": over_plain["ours"],
        "plain": over_plain["peer"],
        "best_fixed": chosen,
        "over_fixed": over_fixed["ratio"],
        "over_fixed_low": over_fixed["ratio_low"],
        "over_plain": over_plain["ratio"],
        "over_plain_low": over_plain["ratio_low"],
        "budget": round(sum(turn.budget for turn in adaptive) / len(adaptive), 2),
        "modes": {m: sum(t.mode == m for t in adaptive) for m in {t.mode for t in adaptive}},
        # The share of all passes, and that in the turn where it was largest.
        "overruns": round(statistics.mean(t.overruns for of in turns.values() for t in of), 3),
        "worst_overruns": round(max(t.overruns for of in turns.values() for t in of), 3),
        "fixed": {
            way: round(sorted(values)[len(values) // 2], _DIGITS) for way, values in fixed.items()
        },
        "passed": over_fixed["ratio_low"] >= _FIXED_BAR and over_plain["ratio_low"] >= _PLAIN_BAR,
    }


def _take_turns(
    adaptive: Side,
    fixed: Side,
    plain: Side,
    speculative: SpeculativeConfig,
    load: ClosedLoop,
    shape: FrontierShape,
) -> dict[str, list[Turn]]:
    ways = [ADAPTIVE, *(PLAIN if tokens == 0 else str(tokens) for tokens in shape.fixed)]
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    order = random.Random(load.concurrency)
    for number in range(shape.turns):
        for way in order.sample(ways, len(ways)):
            side = {ADAPTIVE: adaptive, PLAIN: plain}.get(way, fixed)
            if side is fixed:
                fixed.engine.use_speculation_policy(_fixed(speculative, int(way)))
            turns[way].append(load.turn(side, number))
    return turns


def _fixed(speculative: SpeculativeConfig, num_tokens: int) -> SpeculativeConfig:
    return speculative.model_copy(
        update={
            "scheduler": "full",
            "switching": "always",
            "grouping": "off",
            "num_speculative_tokens": num_tokens,
        }
    )


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['concurrency']} requests: adaptive {row['adaptive']:.1f} tokens/s, "
        f"{row['over_plain']:.3f} times plain, {row['over_fixed']:.3f} times the best fixed "
        f"({'/'.join(row['best_fixed'])}), budget {row['budget']}, overruns {row['overruns']}"
    )
