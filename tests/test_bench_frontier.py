"""Figures of the suites frontier and burst, and a short run of the first."""

from __future__ import annotations

import pytest

from cluster.bench import frontier
from cluster.bench.burst import BurstRun, burst_figures
from cluster.bench.frontier import ADAPTIVE, PLAIN, FrontierShape, frontier_row
from cluster.bench.turns import Turn
from tests.models import DRAFTER, TARGET


def turns(*throughputs: float, budget: float = 2.0) -> list[Turn]:
    return [Turn(throughput=value, budget=budget, mode="speculative") for value in throughputs]


def test_the_best_fixed_number_is_chosen_on_other_turns_than_it_is_compared_on() -> None:
    row = frontier_row(
        4,
        {
            ADAPTIVE: turns(*[100.0] * 8),
            PLAIN: turns(*[50.0] * 8),
            # Lucky in turns of even index: it is chosen on these and compared on the others.
            "1": turns(*[200.0, 10.0] * 4),
            "2": turns(*[90.0] * 8),
        },
    )
    assert row["best_fixed"] == ["2", "1"]
    assert row["over_plain"] == 2.0
    assert row["budget"] == 2.0
    assert row["fixed"]["2"] == 90.0


def test_the_row_fails_where_adaptive_is_slower() -> None:
    ways = {ADAPTIVE: turns(*[95.0] * 6), PLAIN: turns(*[90.0] * 6), "3": turns(*[100.0] * 6)}
    assert not frontier_row(1, ways)["passed"]
    ways["3"] = turns(*[97.0] * 6)
    assert frontier_row(1, ways)["passed"]
    ways[PLAIN] = turns(*[98.0] * 6)
    assert not frontier_row(1, ways)["passed"]


def test_burst_figures_are_ratios_of_paired_runs() -> None:
    def run(p95: float, after: float, flips: int) -> BurstRun:
        return BurstRun(
            token_p95_s=p95,
            gap_p95_s=2 * p95,
            rate_before=10.0,
            rate_after=after,
            went_off=flips > 0,
            back_on_s=1.5,
            flips=flips,
            failed=0,
            refused=3,
        )

    figures = burst_figures([run(1.0, 9.5, 2), run(1.1, 9.0, 3)], [run(1.0, 10.0, 0)] * 2)
    assert figures["p95_ratio"] == pytest.approx(1.05)
    assert figures["recovered_ratio"] == pytest.approx(0.925)
    assert figures["flips"] == 3
    assert figures["went_off"]
    assert figures["refused_by_run"] == [[3, 3], [3, 3]]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_frontier_runs() -> None:
    part = {"dtype": "float32", "num_threads": 1, "enforce_eager": True}
    values = {
        "target": {"model": TARGET, "max_num_seqs": 4, "max_model_len": 256, **part},
        "drafter": part,
        "speculative": {"method": "dspark", "model": DRAFTER, "draft_top_k": 1},
    }
    shape = FrontierShape(
        concurrencies=(1, 3),
        fixed=(0, 2),
        turns=2,
        seconds=0.5,
        warm_up_s=0.1,
        prompt_tokens=32,
        max_tokens=32,
    )
    lines: list[str] = []
    report = frontier.run(values, shape, lines.append)
    rows = report.figures["rows"]
    assert [row["concurrency"] for row in rows] == [1, 3]
    assert len(lines) == 2
    for row in rows:
        assert row["adaptive"] > 0
        assert row["plain"] > 0
        assert row["fixed"].keys() == {PLAIN, "2"}
