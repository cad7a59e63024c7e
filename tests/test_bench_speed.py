"""Comparisons: their arithmetic, and the cluster against an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.bench import overhead
from cluster.bench.drafter_choice import DrafterChoice
from cluster.bench.load_record import LoadResult, RequestRecord
from cluster.bench.load_shape import LoadShape
from cluster.bench.overhead import overhead_figures
from cluster.bench.own_serving import OwnSettings
from cluster.bench.paired import paired_ratio
from cluster.bench.served_load import OURS, SideResults
from cluster.bench.speed import formula_figures, throughput_rows
from cluster.config import ClusterConfig
from cluster.request import SpeculationStats
from tests.training_tools import save_target


def test_the_ratio_is_the_median_of_paired_runs() -> None:
    # A machine that slows down by half in the middle leaves every pair's ratio as it is.
    figures = paired_ratio([10, 11, 21, 20, 22], [10, 10, 20, 20, 20])
    assert (figures["ours"], figures["peer"]) == (20, 20)
    assert figures["ratio"] == pytest.approx(1.05)
    assert figures["ratio_low"] == pytest.approx(1.0)
    assert figures["ratio_high"] == pytest.approx(1.1)
    assert figures["runs"] == 5


def test_one_run_has_no_width() -> None:
    figures = paired_ratio([3.0], [4.0])
    assert figures["ratio_low"] == figures["ratio"] == figures["ratio_high"] == 0.75


def test_runs_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 runs"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="0 and 0 runs"):
        paired_ratio([], [])


def result(
    throughput: float, stats: SpeculationStats | None = None, first_token_s: float = 0.1
) -> LoadResult:
    """One request of so many tokens in a window of one second."""
    record = RequestRecord(
        started_s=0.0, times_s=(first_token_s,), num_tokens=(int(throughput),), stats=stats
    )
    return LoadResult(records=(record,), started_s=0.0, full_until_s=1.0)


def test_throughput_is_compared_with_the_peer_s_best_mode() -> None:
    # 40 passes, 20 of them with 5 guesses each of which 2 were accepted: 2 tokens a pass.
    stats = SpeculationStats(
        num_drafts=20, num_draft_tokens=100, num_accepted_tokens=40, num_steps=40
    )
    sides = {
        OURS: SideResults({4: [result(200, stats), result(220, stats), result(210, stats)]}),
        "plain": SideResults({4: [result(100), result(100), result(100)]}),
        "ngram": SideResults({4: [result(50), result(500), result(105)]}),
    }
    (row,) = throughput_rows(sides)
    assert (row["concurrency"], row["peer_mode"], row["bar"]) == (4, "ngram", 1.4)
    assert (row["ours"], row["peer"]) == (210, 105)
    assert (row["peer_plain"], row["peer_ngram"]) == (100, 105)
    assert row["ratio"] == pytest.approx(2.0)
    assert (row["tokens_per_pass"], row["budget"]) == (2.0, 5.0)
    # Four requests, 210 tokens a second, 2 a pass.
    assert row["round_ms"] == pytest.approx(1e3 * 4 * 2 / 210, abs=1e-3)
    assert [row[f"ratio_at_{n}"] for n in (2, 3, 4)] == pytest.approx([2.0, 3.0, 4.0])


def test_no_acceptance_length_goes_beyond_the_budget() -> None:
    stats = SpeculationStats(
        num_drafts=10, num_draft_tokens=15, num_accepted_tokens=10, num_steps=10
    )
    sides = {
        OURS: SideResults({16: [result(100, stats)]}),
        "plain": SideResults({16: [result(100)]}),
    }
    (row,) = throughput_rows(sides)
    assert [row[f"ratio_at_{n}"] for n in (2, 3, 4)] == pytest.approx([1.0, 1.25, 1.25])


def test_the_formula() -> None:
    figures = formula_figures(
        time_per_token_s=0.012, tokens_per_pass=4.0, draft_s=0.01, verify_s=0.03
    )
    assert figures["expected_ms"] == pytest.approx(10)
    assert figures["measured_ms"] == pytest.approx(12)
    assert figures["ratio"] == pytest.approx(1.2)


def test_overhead_is_of_paired_runs() -> None:
    served = [result(95, first_token_s=0.104), result(48, first_token_s=0.203)]
    in_process = [result(100, first_token_s=0.1), result(50, first_token_s=0.2)]
    figures = overhead_figures(served, in_process)
    assert figures["throughput_ratio"] == pytest.approx((0.95 + 0.96) / 2)
    assert figures["first_token_ms"] == pytest.approx(3.5)
    assert figures["first_token_ms_by_run"] == pytest.approx([4.0, 3.0])
    assert [(row["side"], row["run"]) for row in figures["sides"]] == [
        ("cluster", 1),
        ("cluster", 2),
        ("engine", 1),
        ("engine", 2),
    ]


def test_our_settings_are_a_configuration(tmp_path: Path) -> None:
    drafter = DrafterChoice("small", "dspark", str(tmp_path / "drafter"))
    settings = OwnSettings(target=str(tmp_path), drafter=drafter, drafter_threads=2)
    config = ClusterConfig.parse(settings.values())
    assert config.speculative is not None
    assert config.speculative.scheduler == "prefix"
    assert config.speculative.model == str(tmp_path / "drafter")
    assert (config.target.num_threads, config.drafter.num_threads) == (2, 2)
    (application,) = settings.document()["applications"]
    assert ClusterConfig.parse(application["args"]) == config
    plain = OwnSettings(target=str(tmp_path), drafter=None)
    assert ClusterConfig.parse(plain.values()).speculative is None


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_overhead_of_a_tiny_cluster(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["def add(a, b):"]}\n{"turns": ["class Stack:"]}\n')
    settings = OwnSettings(
        target=str(save_target(tmp_path / "target")),
        drafter=None,
        dtype="float32",
        num_threads=1,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_memory_mb=1,
        enforce_eager=True,  # five starts, each of which would compile
    )
    shape = LoadShape(concurrencies=(2,), waves=2, prompt_tokens=32, max_tokens=12)
    figures = overhead.run(
        settings, shape=shape, data=str(prompts), runs=2, folder=tmp_path, note=print
    ).figures
    assert figures["throughput_ratio"] > 0
    assert [(row["requests"], row["failed"]) for row in figures["sides"]] == [(4, 0)] * 4
    assert ClusterConfig.parse(
        yaml.safe_load((tmp_path / "cluster.yaml").read_text())["applications"][0]["args"]
    ).target.verify_curve == str(tmp_path / "verify-curve.json")
