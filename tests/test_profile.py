"""Profiling a target's steps: the batches, the grid, the cache, and staying out of the way."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.config import ClusterConfig
from cluster.engine import curve_files, loop, profile
from cluster.engine.cache_folder import cache_folder
from cluster.engine.curve_files import CurveCache, read_curve, write_curve
from cluster.engine.engine import Engine
from cluster.engine.loop import EngineLoop
from cluster.engine.machine import curve_origin
from cluster.engine.profile import BatchShape, CurveProfiler, StepProbe
from cluster.engine.runner import Runner
from cluster.engine.step_input import StepInput
from cluster.engine.worker import ShardWorker
from cluster.errors import ConfigError
from cluster.request import Request, SamplingParams
from cluster.speculation.verify_curve import VerifyCurve
from tests.engine_tools import make_config
from tests.models import save_tiny_target
from tests.test_engine_loop import Answers

DIGEST = "cd" * 32
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "max_model_len": 128}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "verify-curves"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_target(tmp_path_factory.mktemp("target"))


def make_engine(config: ClusterConfig, *, target_digest: str | None = DIGEST) -> Engine:
    worker = ShardWorker(config, 0)
    worker.start("", 0, 0)
    return worker.build_engine(None, target_digest=target_digest)


def probe_of(engine: Engine, config: ClusterConfig) -> StepProbe:
    return StepProbe(engine._runner, engine._pages, config.target, engine.max_model_len)


# ------------------------------------------------------------------------------ real steps


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[StepInput]:
    """Every pass that is launched."""
    launched: list[StepInput] = []
    launch = Runner.launch

    def record(self: Runner, step: StepInput) -> None:
        launched.append(step)
        launch(self, step)

    monkeypatch.setattr(Runner, "launch", record)
    return launched


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 8, 31, 32, 48])
def test_steps_are_real_batches_of_the_wanted_size(
    target: str, steps: list[StepInput], num_tokens: int
) -> None:
    config = make_config(target, **SMALL)
    engine = make_engine(config)
    probe = probe_of(engine, config)
    largest = min(num_tokens, 4) * (128 - 8) - max(num_tokens - 32, 0)
    for context in (0, 1, 77, largest):
        shape = probe.shape(num_tokens, context)
        assert shape is not None
        probe.measure(shape)
        step = steps[-1]
        assert step.num_tokens == num_tokens
        assert int((step.context_lens - step.query_lens).sum()) == context
        assert step.context_lens.max() <= 128
        assert len(step.query_lens) <= 4
        # Decoding blocks are sampled at every token, a prompt's chunk at its last one only.
        rows = sum(n if n <= 8 else 1 for n in step.query_lens)
        assert len(step.logit_rows) == rows
        assert len(set(step.slots.tolist())) == num_tokens
        assert step.slots.min() >= config.target.page_size, "page 0 belongs to nobody"
        engine.check()
    assert probe.shape(num_tokens, 4 * 128) is None
    assert probe.shape(4 * 128 + 1, 0) is None


def test_pages_are_spread_as_those_of_growing_requests(target: str, steps: list[StepInput]) -> None:
    config = make_config(target, **SMALL)
    engine = make_engine(config)
    probe = probe_of(engine, config)
    shape = probe.shape(4, 400)
    assert shape is not None
    probe.measure(shape)
    tables = steps[-1].block_tables
    assert len(np.unique(tables[tables > 0])) == sum(-(-n // 16) for n in steps[-1].context_lens)
    neighbours = np.abs(np.diff(tables, axis=1)) == 1
    assert neighbours.mean() < 0.5


def test_measuring_with_requests_around_takes_no_page_of_theirs(target: str) -> None:
    config = make_config(target, **SMALL, num_pages=9)
    engine = make_engine(config)
    probe = probe_of(engine, config)
    shape = probe.shape(1, 127)
    assert shape is not None
    engine.add_request(Request(request_id="r", prompt_token_ids=(1,) * 20))
    engine.step()
    with pytest.raises(RuntimeError, match="no free pages"):
        probe.measure(shape)
    engine.check()


def test_deterministic_steps_are_measured_up_to_a_few_tokens(target: str) -> None:
    config = make_config(target, **SMALL, deterministic=True)
    curve = make_engine(config)._curve_keeper.curve
    assert curve.tokens.tolist() == [1, 2, 4, 8, 16]
    assert curve.context_tokens.tolist() == [0]
    assert float(curve.seconds(16)) > 4 * float(curve.seconds(2))


# ------------------------------------------------------------------------------ the curve


class FakeProbe:
    """Steps that take a known time, some of them disturbed."""

    def __init__(self, disturbed: float = 0.0) -> None:
        self.calls: list[tuple[int, int]] = []
        self._disturbed = disturbed
        self._random = np.random.default_rng(1)

    def token_sizes(self) -> list[int]:
        return [1, 2, 4, 8, 16, 32]

    def context_sizes(self) -> list[int]:
        return [0, 100, 400, 1600]

    def shape(self, num_tokens: int, context_tokens: int) -> BatchShape | None:
        if context_tokens > 400 * num_tokens:
            return None
        return BatchShape((num_tokens,), (context_tokens,))

    def measure(self, shape: BatchShape) -> float:
        size, context = shape.query_lens[0], shape.cached_lens[0]
        self.calls.append((size, context))
        seconds = known_seconds(size, context)
        is_first = self.calls[-2:-1] != [(size, context)]
        slow = 10.0 if is_first or self._random.random() < self._disturbed else 1.0
        return float(slow * seconds)


def known_seconds(size: int, context: int) -> float:
    return 0.01 + 0.001 * size + 1e-5 * context


def test_idle_visits_find_the_true_curve_under_noise() -> None:
    probe = FakeProbe(disturbed=0.3)
    profiler = CurveProfiler(probe)  # type: ignore[arg-type]
    curve = None
    while curve is None:
        curve = profiler.continue_visit()
    grid = [(n, c) for n in probe.token_sizes() for c in probe.context_sizes() if c <= 400 * n]
    assert set(probe.calls) == set(grid)
    found = [float(curve.seconds(n, c)) / known_seconds(n, c) for n, c in grid]
    assert np.mean(np.isclose(found, 1.0)) > 0.9
    # What no batch can be adds what the next batch that can be adds.
    assert float(curve.seconds(1, 1600)) == pytest.approx(known_seconds(1, 1600), rel=0.2)


def test_quick_profile_measures_an_axis_each_and_keeps_to_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = {(n, 0) for n in (1, 2, 4, 8, 16, 32)} | {(1, 100), (4, 1600)}
    probe = FakeProbe()
    curve = CurveProfiler(probe).profile_quickly()  # type: ignore[arg-type]
    assert set(probe.calls) == points
    assert len(probe.calls) == 3 * len(points)
    assert curve.context_tokens.tolist() == [0, 100, 1600]
    monkeypatch.setattr(profile, "_QUICK_S", 0.0)
    hurried = FakeProbe()
    CurveProfiler(hurried).profile_quickly()  # type: ignore[arg-type]
    assert set(hurried.calls) == points
    assert len(hurried.calls) == len(points)


def test_a_given_grid_is_measured_as_given() -> None:
    probe = FakeProbe()
    profiler = CurveProfiler(probe, tokens=[4, 8], contexts=[0, 50])  # type: ignore[arg-type]
    assert profiler.profile_all(repeats=2).table.shape == (2, 2)
    assert len(probe.calls) == 3 * 4


# ------------------------------------------------------------------------------ files and cache


def make_curve(target: str) -> VerifyCurve:
    origin = curve_origin(make_config(target, **SMALL).target, DIGEST, "kernels")
    return VerifyCurve.fit([1, 48], [0, 400], [[0.5, 0.6], [0.7, 0.8]], origin)


def test_a_restart_serves_with_the_cached_curve(target: str) -> None:
    cache = CurveCache(cache_folder("verify-curves"))
    cache.save(make_curve(target))
    engine = make_engine(make_config(target, **SMALL))
    assert float(engine.cost_model.verify_seconds(48, 400)) == 0.8
    other = make_engine(make_config(target, **SMALL), target_digest="ef" * 32)
    assert float(other.cost_model.verify_seconds(48, 400)) < 0.5
    uncached = make_engine(make_config(target, **SMALL), target_digest=None)
    assert float(uncached.cost_model.verify_seconds(48, 400)) < 0.5


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1, 2", None])
def test_broken_and_foreign_cache_files_are_ignored_by_name(
    target: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    cache = CurveCache(cache_folder("verify-curves"))
    curve = make_curve(target)
    assert curve.origin is not None
    path = cache.path(curve.origin)
    if content is None:
        foreign = dataclasses.replace(curve.origin, target_digest="00" * 32)
        write_curve(path, dataclasses.replace(curve, origin=foreign))
    else:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert cache.load(curve.origin) is None
    assert str(path) in caplog.text


def test_nothing_cached_is_no_warning(target: str, caplog: pytest.LogCaptureFixture) -> None:
    origin = make_curve(target).origin
    assert origin is not None
    assert CurveCache(cache_folder("verify-curves")).load(origin) is None
    assert not caplog.records


def test_the_cache_is_bounded_and_drops_the_oldest(
    target: str, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve_files, "_MAX_CACHED_CURVES", 3)
    cache = CurveCache(cache_dir)
    curve = make_curve(target)
    assert curve.origin is not None
    origins = [dataclasses.replace(curve.origin, num_threads=n) for n in range(1, 6)]
    for age, origin in enumerate(origins):
        cache.save(dataclasses.replace(curve, origin=origin))
        os.utime(cache.path(origin), (age, age))
    assert [cache.load(origin) is not None for origin in origins] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert len(list(cache_dir.iterdir())) == 3


def test_a_cache_that_cannot_be_written_costs_a_warning(
    target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    CurveCache(tmp_path / "file").save(make_curve(target))
    assert str(tmp_path / "file") in caplog.text


def test_a_configured_curve_is_used_as_it_is(target: str, tmp_path: Path) -> None:
    path = tmp_path / "curves" / "curve.json"
    write_curve(path, VerifyCurve.of_tokens({1: 3.0, 48: 4.0}))
    CurveCache(cache_folder("verify-curves")).save(make_curve(target))
    values = {"target": {"model": target, "dtype": "float32", "verify_curve": "curves/curve.json"}}
    config = ClusterConfig.parse(values, base_dir=tmp_path)
    assert config.target.verify_curve == str(path)
    engine = make_engine(config)
    assert engine.cost_model.verify_seconds([1, 48]).tolist() == [3.0, 4.0]
    assert engine.work_idle() is False
    assert engine.cost_model.verify_seconds([1, 48]).tolist() == [3.0, 4.0]


def test_a_broken_configured_curve_is_refused_by_file_and_key(target: str, tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    values = VerifyCurve.of_tokens({1: 3.0, 48: 4.0}).to_dict()
    path.write_text(json.dumps({**values, "tokens": [48, 1]}))
    with pytest.raises(ConfigError, match=rf"{path}: tokens: must rise"):
        make_engine(make_config(target, **SMALL, verify_curve=str(path)))
    path.write_text("{")
    with pytest.raises(ConfigError, match=rf"{path}: is not JSON"):
        read_curve(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_curve(tmp_path / "none.json")


# ------------------------------------------------------------------------------ while idle


class Gate:
    """Lets every measured step wait until the test allows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_begun = 0
        self.begun = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)
        measure = StepProbe.measure

        def gated(probe: StepProbe, shape: BatchShape) -> float:
            self.num_begun += 1
            self.begun.release()
            assert self.allowed.acquire(timeout=30)
            return measure(probe, shape)

        monkeypatch.setattr(StepProbe, "measure", gated)

    def open(self) -> None:
        self.allowed.release(10_000)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def idle_loop(
    target: str, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[EngineLoop, Gate]]:
    monkeypatch.setattr(loop, "_IDLE_WAIT_S", 0.01)
    engine = make_engine(make_config(target, **SMALL))
    gate = Gate(monkeypatch)
    engine_loop = EngineLoop(engine, answers)
    engine_loop.start()
    yield engine_loop, gate
    gate.open()
    engine_loop.stop()


def test_a_request_waits_for_one_measured_pass_at_most(
    idle_loop: tuple[EngineLoop, Gate], answers: Answers
) -> None:
    engine_loop, gate = idle_loop
    for number in range(8):  # also in the middle of a visit
        assert gate.begun.acquire(timeout=30)
        params = SamplingParams(temperature=0.0, max_tokens=3)
        engine_loop.submit(
            Request(request_id=f"r{number}", prompt_token_ids=(1, 2), sampling=params)
        )
        begun = gate.num_begun
        gate.allowed.release()
        assert answers.last(f"r{number}").error is None
        assert gate.num_begun <= begun + 1  # the one behind the request, if it has begun already
        assert engine_loop.failure is None


def test_idle_measuring_ends_with_a_saved_curve(
    idle_loop: tuple[EngineLoop, Gate], target: str, cache_dir: Path
) -> None:
    engine_loop, gate = idle_loop
    quick = engine_loop.engine._curve_keeper.curve
    gate.open()
    origin = curve_origin(make_config(target, **SMALL).target, DIGEST, "kernels")
    path = CurveCache(cache_dir).path(origin)
    wait_for(path.exists)
    saved = read_curve(path)
    wait_for(lambda: engine_loop.engine._curve_keeper.curve is not quick)
    np.testing.assert_array_equal(engine_loop.engine._curve_keeper.curve.table, saved.table)
    for column, context in enumerate(saved.context_tokens):
        seconds = engine_loop.engine.cost_model.verify_seconds(saved.tokens, int(context))
        np.testing.assert_allclose(seconds, saved.table[:, column])
    assert engine_loop.failure is None


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
