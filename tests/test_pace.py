"""Paced devices: time as a profile says it, and what is really computed as ever."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cluster.config import ClusterConfig, DrafterConfig
from cluster.engine.draft_client import DraftSampling, SessionKey
from cluster.engine.pace import DraftPace, Pace, draft_pace, target_pace
from cluster.engine.profile_files import read_profile
from cluster.errors import ConfigError
from cluster.pace_config import PaceConfig
from cluster.request import Request, SamplingParams
from cluster.rpc.cluster_status import DrafterStatus, drafter_to_proto
from cluster.rpc.convert import pace_from_proto
from cluster.speculation.device_profile import DeviceProfile
from cluster.speculation.draft_curve import DraftCurve
from cluster.speculation.verify_curve import VerifyCurve
from tests.draft_helpers import BLOCK, D, append, make_drafter, round_of, sequence
from tests.draft_helpers import make_engine as make_draft_engine
from tests.engine_tools import make_config, make_engine, run, run_sharded
from tests.models import save_tiny_target

PROFILES = Path(__file__).resolve().parents[1] / "deployments" / "profiles"


class FakeTime:
    """A clock that only sleeping and ``work`` move."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.now += seconds


def _pace(fake: FakeTime, num_stages: int = 1) -> Pace:
    return Pace("test", 1.0, num_stages=num_stages, clock=fake.clock, sleep=fake.sleep)


def test_real_work_counts_inside_a_passs_time() -> None:
    fake = FakeTime()
    pace = _pace(fake)
    paced = pace.begin(0.010)
    fake.work(0.004)
    pace.end(paced)
    assert fake.now == pytest.approx(100.010)
    assert fake.slept == [pytest.approx(0.006)]
    assert (pace.stats.num_passes, pace.stats.num_overruns) == (1, 0)


def test_a_pass_that_takes_longer_is_counted_and_delays_the_next() -> None:
    fake = FakeTime()
    pace = _pace(fake)
    first, second = pace.begin(0.010), pace.begin(0.010)
    fake.work(0.025)
    pace.end(first)
    assert fake.slept == []
    pace.end(second)  # was to end at 20 ms; its real work had been done by 25
    stats = pace.stats
    assert (stats.num_passes, stats.num_overruns) == (2, 2)
    assert stats.worst_overrun == pytest.approx(2.5)
    third = pace.begin(0.010)
    pace.end(third)
    assert fake.now == pytest.approx(100.035)
    pace.forget()
    assert (pace.stats.num_passes, pace.stats.worst_overrun) == (0, 1.0)


def test_passes_queue_for_one_device() -> None:
    fake = FakeTime()
    pace = _pace(fake)
    first, second = pace.begin(0.010), pace.begin(0.020)
    pace.end(first)
    assert fake.now == pytest.approx(100.010)
    pace.end(second)
    assert fake.now == pytest.approx(100.030)


def test_stages_work_on_different_passes_at_once() -> None:
    fake = FakeTime()
    pace = _pace(fake, num_stages=2)
    passes = [pace.begin(0.010) for _ in range(3)]
    ends = []
    for paced in passes:
        pace.end(paced)
        ends.append(fake.now - 100.0)
    np.testing.assert_allclose(ends, [0.010, 0.015, 0.020])


def test_waiting_is_precise_and_leaves_the_core_to_others() -> None:
    pace = Pace("test", 1.0)
    counted = 0
    is_over = threading.Event()

    def count() -> None:
        nonlocal counted
        while not is_over.is_set():
            counted += 1
            time.sleep(0.001)

    other = threading.Thread(target=count)
    other.start()
    errors = []
    cpu_start, start = time.thread_time(), time.monotonic()
    for _ in range(20):
        paced = pace.begin(0.01)
        pace.end(paced)
        errors.append(time.monotonic() - paced.end)
    cpu_s, elapsed_s = time.thread_time() - cpu_start, time.monotonic() - start
    is_over.set()
    other.join()
    assert min(errors) >= 0
    assert sorted(errors)[5] < 0.5e-3  # of an idle machine all; other work may delay some
    assert elapsed_s >= 0.2
    assert cpu_s < 0.02
    assert counted > 20  # Python's lock was free


def _write_profile(folder: Path, *, target: float = 0.05, drafter: float = 0.02) -> str:
    profile = DeviceProfile(
        name="slow",
        source="made up",
        target=VerifyCurve.of_tokens({1: target, 64: target}),
        drafter=DraftCurve.of_sessions({1: drafter, 4: 3 * drafter}),
    )
    path = folder / "slow.yaml"
    path.write_text(yaml.safe_dump(profile.to_dict()))
    return str(path)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


def _requests(count: int = 1) -> list[Request]:
    return [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=(1, 2, 3 + i),
            sampling=SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
        )
        for i in range(count)
    ]


def test_an_engine_keeps_its_profiles_pace_and_says_what_it_said(
    target: str, tmp_path: Path
) -> None:
    plain = run(make_engine(make_config(target)), _requests())
    config = make_config(target, pace={"profile": _write_profile(tmp_path), "time_scale": 1.5})
    engine = make_engine(config)
    # Nothing is measured: the curve is the profile's.
    np.testing.assert_allclose(engine.cost_model.verify_seconds([1, 64]), 0.075)
    start = time.monotonic()
    paced = run(engine, _requests())
    elapsed_s = time.monotonic() - start
    assert paced["r0"].token_ids == plain["r0"].token_ids
    assert elapsed_s >= 4 * 0.075
    stats = engine.load().paced
    assert stats is not None
    assert (stats.profile, stats.time_scale, stats.num_passes) == ("slow", 1.5, 4)
    assert make_engine(make_config(target)).load().paced is None
    engine.close()


@pytest.mark.slow
def test_two_stages_are_paced_as_two_devices(target: str, tmp_path: Path) -> None:
    pace = {"profile": _write_profile(tmp_path, target=0.1)}
    config = make_config(target, pipeline_parallel_size=2, max_num_seqs=4, pace=pace)
    plain = run(make_engine(make_config(target)), _requests(2))
    paced = run_sharded(config, _requests(2))
    for request_id, completion in plain.items():
        assert paced[request_id].token_ids == completion.token_ids


def test_rounds_take_what_the_drafters_profile_says() -> None:
    pace = DraftPace(Pace("slow", 1.0), DraftCurve.of_sessions({1: 0.05, 2: 0.1}))
    unpaced, paced = make_draft_engine(make_drafter()), make_draft_engine(make_drafter(), pace=pace)
    keys = [SessionKey(f"s{i}", 1) for i in range(2)]
    rows = torch.randn(6, D, generator=torch.Generator().manual_seed(0))
    for engine in (unpaced, paced):
        for key in keys:
            engine.open("a", key, DraftSampling(temperature=0.0))
            append(engine, "a", key, 0, rows)
    asked = round_of(*(sequence(key, 7) for key in keys))
    start = time.monotonic()
    (slow,) = paced.draft([("a", asked)])
    assert time.monotonic() - start >= 0.1
    (fast,) = unpaced.draft([("a", asked)])
    for ours, theirs in zip(slow, fast, strict=True):
        assert ours.proposal is not None
        assert theirs.proposal is not None
        assert ours.proposal.draft_token_ids == theirs.proposal.draft_token_ids
        assert len(ours.proposal.draft_token_ids) == BLOCK
    assert paced.paced is not None
    assert paced.paced.num_passes == 1
    assert unpaced.paced is None
    # Asked again, the answer is there already: no pass.
    start = time.monotonic()
    paced.draft([("a", asked)])
    assert time.monotonic() - start < 0.05


def test_status_messages_carry_the_pace() -> None:
    pace = Pace("h100", 4.0)
    pace.end(pace.begin(1e-6))
    status = DrafterStatus(drafter_id="d", address="a", state="ready", paced=pace.stats)
    assert pace_from_proto(drafter_to_proto(status)) == pace.stats
    unpaced = DrafterStatus(drafter_id="d", address="a", state="ready")
    assert pace_from_proto(drafter_to_proto(unpaced)) is None


@pytest.mark.parametrize("name", ["h100-8b-tp1", "h100-8b-a10", "h100-70b-tp8", "a100-70b-w4"])
def test_a_configuration_names_the_profiles_that_are_shipped(name: str) -> None:
    values = {
        "target": {"model": "m", "pace": {"profile": name, "time_scale": 2}},
        "drafter": {"pace": {"profile": name, "time_scale": 2}},
    }
    config = ClusterConfig.parse(values, base_dir=PROFILES.parent)
    profile = read_profile(PROFILES / f"{name}.yaml")
    assert profile.name == name
    paced, drafting = target_pace(config.target.pace, 1), draft_pace(config.drafter.pace)
    assert paced is not None
    assert drafting is not None
    assert profile.target is not None
    assert profile.drafter is not None
    np.testing.assert_allclose(paced.curve.table, 2 * profile.target.table)
    np.testing.assert_allclose(drafting.curve.table, 2 * profile.drafter.table)


# Of NVIDIA's data sheets, with the shares of them that docs/pace.md takes.
_LINK_BYTES_PER_S = 0.8 * 450e9
_H100, _A100, _A10 = (
    (0.8 * bytes_per_s, 0.6 * flops_per_s)
    for bytes_per_s, flops_per_s in ((3.35e12, 989e12), (2.039e12, 312e12), (600e9, 125e12))
)
_8B = {
    "device": _H100,
    "weights": 7.505e9,
    "gpus": 1,
    "hidden": 4096,
    "layers": 32,
    "launch_s": 4e-4,
    "drafter": 2 * 218.1e6 + 525.3e6,
}
_70B = {
    "device": _H100,
    "weights": 69.50e9,
    "gpus": 8,
    "hidden": 8192,
    "layers": 80,
    "launch_s": 8e-4,
    "drafter": 2 * 855.6e6 + 1050.7e6,
}
# 4 bits and a 16-bit scale for each 128 weights, but for the output head.
_70B_W4 = {
    **_70B,
    "device": _A100,
    "gpus": 1,
    "bytes": (69.50e9 - 1050.7e6) * (0.5 + 2 / 128) + 2 * 1050.7e6,
}


def _target_seconds(shape: dict[str, Any], tokens: float, context: float) -> float:
    weights, gpus = shape["weights"], shape["gpus"]
    bytes_per_s, flops_per_s = shape["device"]
    read_s = shape.get("bytes", 2 * weights) / gpus / bytes_per_s
    compute_s = 2 * weights * tokens / gpus / flops_per_s
    link_bytes = tokens * shape["hidden"] * 2 * 2 * (gpus - 1) / gpus
    reduce_s = 0.0
    if gpus > 1:
        reduce_s = 2 * shape["layers"] * (12e-6 + link_bytes / _LINK_BYTES_PER_S)
    cache_s = context * shape["layers"] * 8 * 128 * 2 * 2 / gpus / bytes_per_s
    return float(shape["launch_s"] + max(read_s, compute_s) + reduce_s + cache_s)


@pytest.mark.parametrize(
    ("name", "drafts_on", "shape"),
    [
        ("h100-8b-tp1", _H100, _8B),
        ("h100-8b-a10", _A10, _8B),
        ("h100-70b-tp8", _H100, _70B),
        ("a100-70b-w4", _A100, _70B_W4),
    ],
)
def test_derived_profiles_are_what_their_derivation_says(
    name: str, drafts_on: tuple[float, float], shape: dict[str, Any]
) -> None:
    profile = read_profile(PROFILES / f"{name}.yaml")
    assert profile.target is not None
    assert profile.drafter is not None
    for row, tokens in enumerate(profile.target.tokens):
        for column, context in enumerate(profile.target.context_tokens):
            expected = _target_seconds(shape, tokens, context)
            assert profile.target.table[row, column] == pytest.approx(expected, rel=1e-3)
    for sessions, seconds in zip(profile.drafter.sessions, profile.drafter.table, strict=True):
        weights = shape["drafter"]
        bytes_per_s, flops_per_s = drafts_on
        pass_s = max(2 * weights / bytes_per_s, 2 * weights * 7 * sessions / flops_per_s)
        heads_s = 7 * (20e-6 + 128256 * 256 * 2 / bytes_per_s)
        assert seconds == pytest.approx(3e-4 + pass_s + heads_s, rel=1e-3)


def test_pace_brings_the_curve_and_one_scale() -> None:
    pace = {"profile": "p"}
    with pytest.raises(ConfigError, match="verify_curve"):
        ClusterConfig.parse({"target": {"model": "m", "pace": pace, "verify_curve": "c"}})
    with pytest.raises(ConfigError, match="time_scale"):
        ClusterConfig.parse(
            {"target": {"model": "m", "pace": pace}, "drafter": {"pace": {**pace, "time_scale": 2}}}
        )
    with pytest.raises(ConfigError) as error:
        ClusterConfig.parse({"target": {"model": "m", "pace": {**pace, "time_scale": 0}}})
    assert error.value.key == "target.pace.time_scale"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "device profile: must be a mapping"),
        ("format: other", "format: must be"),
        ("format: dspark-device-profile\nversion: 2", "version: must be 1"),
        ("format: dspark-device-profile\nversion: 1\nname: x", "source: must be a text"),
        ("targets: 1", "targets: unknown key"),
        (
            "format: dspark-device-profile\nversion: 1\nname: x\nsource: y\n"
            "drafter: {sessions: [1], seconds: [0]}",
            "drafter.seconds: must be positive",
        ),
        ("a: [", "is not YAML"),
    ],
)
def test_a_broken_profile_is_refused_with_its_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_profile(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_profile_without_the_part_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.json"
    values = DeviceProfile(name="x", source="y").to_dict()
    path.write_text(str(values).replace("'", '"').replace("None", "null"))
    with pytest.raises(ConfigError, match="has no target"):
        target_pace(PaceConfig(profile=str(path)), 1)
    with pytest.raises(ConfigError, match="has no drafter"):
        draft_pace(DrafterConfig(pace=PaceConfig(profile=str(path))).pace)
    with pytest.raises(ConfigError, match="cannot be read"):
        target_pace(PaceConfig(profile=str(tmp_path / "none.yaml")), 1)


def test_an_engine_without_a_pace_is_not_paced() -> None:
    assert target_pace(None, 1) is None
    assert draft_pace(None) is None
