"""Simulated fleets: closed forms, conservation, seeds, bad files, a pool that follows its load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.bench.fleet_files import read_fleet
from cluster.bench.simulate import fleet_of_way, frontier_rows, simulate
from cluster.errors import ConfigError
from cluster.simulation.acceptance import AcceptanceModel
from cluster.simulation.fleet import Fleet, FleetConfig
from cluster.simulation.simulation import Detail, FleetSimulation
from cluster.simulation.workload import ClosedLoop, LoadStep, step_jobs
from cluster.speculation.device_profile import DeviceProfile
from cluster.speculation.draft_curve import DraftCurve
from cluster.speculation.verify_curve import VerifyCurve

STEP_S = {1: 0.010, 32: 0.012, 64: 0.020, 256: 0.080}
ROUND_S = 0.002
PROFILE = DeviceProfile(
    name="test",
    source="made up",
    target=VerifyCurve.of_tokens(STEP_S),
    drafter=DraftCurve.of_sessions({1: ROUND_S, 64: ROUND_S}),
)
CONDITIONAL = [0.8, 0.75, 0.7, 0.7]


def make_fleet(**parts: dict[str, Any]) -> Fleet:
    values: dict[str, Any] = {
        "target": {"profile": "test", "max_num_seqs": 32},
        "drafter": {"network_ms": 0.0},
        "acceptance": {"conditional": CONDITIONAL},
    }
    for name, part in parts.items():
        values[name] = {**values.get(name, {}), **part}
    return Fleet.of(FleetConfig.parse(values), {"test": PROFILE})


def decode_s(num_tokens: int) -> float:
    assert PROFILE.target is not None
    return float(PROFILE.target.seconds(num_tokens))


@pytest.mark.parametrize("concurrency", [1, 8, 32])
def test_plain_throughput_is_requests_over_the_time_of_a_pass(concurrency: int) -> None:
    fleet = fleet_of_way(make_fleet(), "plain")
    # A prompt of one token costs no pass of its own size.
    figures = simulate(fleet, ClosedLoop(concurrency, 1, 100, 20.0, 2.0))
    assert figures["throughput"] == pytest.approx(concurrency / decode_s(concurrency), rel=0.01)


def test_certain_guesses_are_all_accepted() -> None:
    fleet = make_fleet(acceptance={"conditional": [1.0] * 4})
    figures = simulate(fleet_of_way(fleet, "3"), ClosedLoop(4, 1, 1001, 40.0, 2.0))
    expected = 4 * 4 / (decode_s(16) + ROUND_S)
    assert figures["throughput"] == pytest.approx(expected, rel=0.02)
    assert figures["acceptance_length"] == pytest.approx(4.0, rel=0.01)


def test_acceptance_is_as_given_at_each_position() -> None:
    model = AcceptanceModel(CONDITIONAL, request_spread=0.7, round_spread=0.7)
    rng = np.random.default_rng(3)
    confidences = model.confidences(rng, model.requests(rng, 4000), 10, 4)
    accepted = np.cumprod(rng.random(confidences.shape) < confidences, axis=2)
    reached = accepted.mean(axis=(0, 1))
    conditional = reached / np.concatenate([[1.0], reached[:-1]])
    np.testing.assert_allclose(conditional, CONDITIONAL, atol=0.015)


@pytest.mark.parametrize("stretch_s", [0.0, 0.5])
def test_every_request_ends_and_tokens_add_up(stretch_s: float) -> None:
    fleet = make_fleet(
        target={"num_replicas": 3, "kv_cache_tokens": 500, "max_num_batched_tokens": 100},
        drafter={"min_replicas": 2, "max_replicas": 2},
    )
    jobs = list(
        step_jobs([LoadStep(4.0, 20.0)], num_prompt_tokens=150, num_output_tokens=40, seed=1)
    )
    simulation = FleetSimulation(fleet, Detail(stretch_s=stretch_s))
    figures = simulation.run_open(jobs)
    assert len(jobs) > 40
    assert figures["requests"] == len(jobs)
    assert figures["output_tokens"] == 40 * len(jobs)
    assert figures["preemptions"] > 0
    for job in jobs:
        assert job.num_made == job.num_output_tokens
        assert job.arrival_s <= job.started_s < job.first_token_s < job.ended_s
    assert all(not r.waiting and not len(r.running) for r in simulation.replicas)


def test_a_seed_decides_everything() -> None:
    loop = ClosedLoop(6, 30, 60, 4.0)
    first, again = (simulate(make_fleet(), loop) for _ in range(2))
    del first["processor_s"], again["processor_s"]
    assert first == again
    other = Fleet.of(make_fleet().config.model_copy(update={"seed": 5}), {"test": PROFILE})
    assert simulate(other, loop)["output_tokens"] != first["output_tokens"]


def test_a_frontier_has_a_row_for_each_load() -> None:
    loops = [ClosedLoop(n, 1, 100, 3.0, 0.5) for n in (1, 32)]
    few, many = frontier_rows(make_fleet(), loops, lambda line: None)
    assert list(few["fixed"]) == ["plain", "1", "2", "3", "4"]
    assert few["budget"] > many["budget"]
    for row in (few, many):
        assert row["adaptive"] > 0.9 * max(row["fixed"].values())


def test_stretches_change_little() -> None:
    config = make_fleet(speculative={"grouping": "off"}).config
    loop = ClosedLoop(8, 20, 200, 20.0, 2.0)
    exact = stretched = 0.0  # one seed alone is 2% of chance
    for seed in range(4):
        fleet = Fleet.of(config.model_copy(update={"seed": seed}), {"test": PROFILE})
        exact += simulate(fleet, loop)["throughput"]
        stretched += simulate(fleet, loop, Detail(stretch_s=0.5))["throughput"]
    assert stretched == pytest.approx(exact, rel=0.05)


def test_a_long_stretch_brings_what_its_passes_do_one_by_one() -> None:
    # Requests are alike: there are too few of them to even out.
    fleet = make_fleet(acceptance={"request_spread": 0.0}, speculative={"grouping": "off"})
    loop = ClosedLoop(2, 20, 3000, 60.0, 2.0)
    exact = simulate(fleet, loop)
    together = simulate(fleet, loop, Detail(stretch_s=30.0))
    for name in ("throughput", "acceptance_length", "budget"):
        assert together[name] == pytest.approx(exact[name], rel=0.05)


def test_the_pool_follows_a_step_of_load() -> None:
    slow = DeviceProfile(
        name="slow drafter",
        source="made up",
        target=PROFILE.target,
        drafter=DraftCurve.of_sessions({1: 0.004, 2: 0.006, 16: 0.048}),
    )
    values = make_fleet(
        target={"num_replicas": 2},
        drafter={"max_replicas": 4, "start_s": 2.0},
        pool={"down_s": 5.0},
        speculative={"grouping": "off"},
    ).config
    fleet = Fleet.of(values, {"test": slow})
    jobs = step_jobs(
        [LoadStep(10.0, 0.5), LoadStep(15.0, 6.0), LoadStep(25.0, 0.5)],
        num_prompt_tokens=20,
        num_output_tokens=60,
        seed=2,
    )
    changes = simulate(fleet, lambda: jobs)["drafter_changes"]
    more = [change["time_s"] for change in changes if change["ready"] > 1]
    assert more
    assert 10.0 < more[0] < 20.0
    assert changes[-1]["wanted"] < max(change["wanted"] for change in changes)


def test_a_colocated_drafter_adds_its_time_and_no_device() -> None:
    certain = {"acceptance": {"conditional": [1.0] * 4}, "target": {"num_replicas": 2}}
    loop = ClosedLoop(8, 1, 1001, 20.0, 2.0)
    slow = make_fleet(**certain, drafter={"network_ms": 10.0, "min_replicas": 2, "max_replicas": 2})
    values = slow.config.model_dump(exclude_unset=True)
    values["drafter"] = {"placement": "colocated", "network_ms": 10.0}
    near = Fleet.of(FleetConfig.parse(values), {"test": PROFILE})
    found = simulate(fleet_of_way(near, "3"), loop)
    expected = 2 * 4 * 4 / (decode_s(16) + ROUND_S)  # in rounds of four requests, without network
    assert found["throughput"] == pytest.approx(expected, rel=0.02)
    assert found["devices"] == 2
    remote = simulate(fleet_of_way(slow, "3"), loop)
    assert remote["devices"] == 4
    assert remote["throughput_per_device"] < found["throughput_per_device"] / 2


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("target: {profile: none}", "none"),
        ("target: {profile: test, num_replica: 1}", "target.num_replica"),
        ("target: {profile: test, num_replicas: 0}", "target.num_replicas"),
        ("target: {profile: test}\ndrafter: {}", "acceptance"),
        ("target: {profile: test}\nacceptance: {conditional: [1.5]}", "acceptance.conditional"),
        (
            "target: {profile: test}\nacceptance: {conditional: [1]}\n"
            "drafter: {min_replicas: 3, max_replicas: 2}",
            "drafter",
        ),
        ("target: {profile: test", "YAML"),
    ],
)
def test_bad_fleet_files_are_refused_by_key(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_fleet(path)
    assert key in str(refused.value)


def test_the_fleet_of_the_docs_can_be_read() -> None:
    folder = Path(__file__).parents[1] / "deployments" / "fleets"
    for path in folder.glob("*.yaml"):
        fleet = read_fleet(path)
        assert math.isfinite(float(fleet.target.seconds(64)))
