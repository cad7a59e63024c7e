"""Suite ``simulator``: predictions against measurements, and what is no measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster.bench.fleet_files import read_fleet
from cluster.bench.simulator import compare, read_rows, time_trace
from cluster.errors import ConfigError, DataError
from cluster.simulation.simulation import Detail
from cluster.simulation.workload import LoadStep, step_jobs, trace_jobs
from tests.test_simulation import make_fleet

ROOT = Path(__file__).parents[1]


def row(concurrency: int, adaptive: float, plain: float, seven: float) -> dict[str, Any]:
    return {
        "concurrency": concurrency,
        "adaptive": adaptive,
        "fixed": {"plain": plain, "7": seven},
    }


def test_the_worst_point_decides() -> None:
    predicted = [row(1, 30.0, 10.0, 30.0), row(8, 95.0, 80.0, 92.0)]
    measured = [row(1, 31.0, 10.0, 31.0), row(8, 100.0, 80.0, 100.0)]
    report = compare(predicted, measured)
    assert report.passed
    assert report.figures["worst_error"] == pytest.approx(0.08)
    assert report.figures["worst_point"] == "fixed 7 at 8"
    assert report.figures["points"] == 6
    measured[0]["fixed"]["plain"] = 8.9
    report = compare(predicted, measured)
    assert not report.passed
    assert report.figures["worst_point"] == "plain at 1"
    assert report.figures["within_10_percent"] == 5


def test_a_slow_trace_does_not_pass() -> None:
    rows = [row(1, 30.0, 10.0, 30.0)]
    assert compare(rows, rows, {"trace_seconds": 299.0, "requests": 5}).passed
    assert not compare(rows, rows, {"trace_seconds": 301.0, "requests": 5}).passed


def test_what_was_not_predicted_is_refused() -> None:
    predicted = [row(1, 30.0, 10.0, 30.0)]
    with pytest.raises(DataError, match="2 requests"):
        compare(predicted, [row(2, 30.0, 10.0, 30.0)])
    other = row(1, 30.0, 10.0, 30.0)
    other["fixed"]["3"] = 20.0
    with pytest.raises(DataError, match="3 tokens"):
        compare(predicted, [other])
    with pytest.raises(DataError, match="no row"):
        compare(predicted, [])


@pytest.mark.parametrize("text", ["", "[]", '{"figures": {}}', '{"figures": {"rows": [{}]}}'])
def test_files_without_a_frontier_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "frontier.json"
    path.write_text(text)
    with pytest.raises(DataError, match="frontier"):
        read_rows(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "none.json")


def test_the_command_fails_where_a_point_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted, measured = tmp_path / "predicted.json", tmp_path / "measured.json"
    words = ["bench", "simulator", "--json", "--predicted", str(predicted)]
    words += ["--measured", str(measured)]
    measured.write_text(json.dumps({"figures": {"rows": [row(4, 50.0, 30.0, 40.0)]}}))
    for value, status in ((46.0, 0), (40.0, 1)):
        predicted.write_text(json.dumps({"figures": {"rows": [row(4, value, 30.0, 40.0)]}}))
        assert cli.main(words) == status
        figures = json.loads(capsys.readouterr().out)["figures"]
        assert figures["worst_error"] == pytest.approx(1 - value / 50.0)


def test_the_committed_prediction_is_of_the_shipped_fleet() -> None:
    path = ROOT / "docs" / "predictions" / "frontier-h100-8b-a10.json"
    document = json.loads(path.read_text())
    assert document["fleet"] == (ROOT / "deployments/fleets/frontier-h100-8b-a10.yaml").read_text()
    rows = read_rows(path)
    assert [r["concurrency"] for r in rows] == [1, 2, 4, 8, 16, 32, 64]
    for r in rows:
        assert list(r["fixed"]) == ["plain", *"1234567"]


def test_repetitions_of_a_trace_keep_its_requests_but_not_its_seconds() -> None:
    steps = [LoadStep(600.0, 0.5)]
    trace = list(step_jobs(steps, num_prompt_tokens=9, num_output_tokens=7, seed=4))
    for number, job in enumerate(trace):
        job.num_prompt_tokens = number + 1
    jobs = list(trace_jobs(trace, repeat=3, seed=1))
    count = len(trace)
    assert len(jobs) == 3 * count
    times = [job.arrival_s for job in jobs]
    assert times == sorted(times)
    for turn in range(3):
        part = jobs[turn * count : (turn + 1) * count]
        assert sorted(job.num_prompt_tokens for job in part) == list(range(1, count + 1))
    first, second = times[:count], times[count : 2 * count]
    shifts = {round(b - a, 3) for a, b in zip(first, second, strict=True)}
    assert len(shifts) > count / 2
    assert times == [job.arrival_s for job in trace_jobs(trace, repeat=3, seed=1)]
    assert times != [job.arrival_s for job in trace_jobs(trace, repeat=3, seed=2)]


def test_a_trace_is_timed() -> None:
    jobs = step_jobs([LoadStep(5.0, 2.0)], num_prompt_tokens=9, num_output_tokens=30, seed=1)
    found = time_trace(make_fleet(), lambda: jobs, Detail(stretch_s=30.0))
    assert found["requests"] > 0
    assert found["trace_seconds"] >= 0


def test_a_colocated_drafter_needs_no_device_and_no_network(tmp_path: Path) -> None:
    path = ROOT / "deployments" / "fleets" / "conversations-h100-70b-colocated.yaml"
    fleet = read_fleet(path)
    assert fleet.config.drafter is not None
    assert fleet.config.drafter.is_colocated
    text = path.read_text().replace(
        "placement: colocated", "placement: colocated\n  max_replicas: 2"
    )
    other = tmp_path / "fleet.yaml"
    other.write_text(text.replace("../", f"{ROOT}/deployments/"))
    with pytest.raises(ConfigError, match="remote drafters"):
        read_fleet(other)
