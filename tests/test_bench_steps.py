"""Plain steps: the processes that are timed in turn."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench import round_terms
from cluster.bench.drafter_choice import DrafterChoice
from cluster.bench.own_serving import OwnSettings
from cluster.bench.own_steps import OwnSteps
from cluster.bench.plain_steps import compare_steps, start_own_steps
from cluster.bench.step_server import StepServer
from cluster.errors import DsparkError
from tests.models import save_tiny_drafter, save_tiny_target


def save_program(folder: Path, code: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(code))
    return [sys.executable, str(path), json.dumps({"step_s": 0.25})]


FAKE_PROGRAM = """
    from cluster.bench.peer_steps import serve
    class Fake:
        def __init__(self, settings):
            print("noise on standard output")
            self.step_s, self.size = settings["step_s"], 0
        def fill(self, prompts, max_tokens):
            self.size = len(prompts)
            self.context = len(prompts[0])
        def steps(self, count):
            if self.size == 3:
                raise RuntimeError("three is too many")
            return [9.0, 9.0] + [self.step_s * self.size * self.context] * (count - 2)
        def clear(self):
            self.size = 0
    serve(Fake)
"""


class FakePrompts:
    """Takes prompts of any length from nowhere."""

    def take(self, num_tokens: int) -> tuple[int, ...]:
        return (5,) * num_tokens


def start_fake(folder: Path, name: str, step_s: float) -> StepServer:
    command = save_program(folder, FAKE_PROGRAM)
    command[-1] = json.dumps({"step_s": step_s})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return StepServer(command, environment, folder / f"{name}.log")


def test_steps_are_compared_without_those_that_wake_up(tmp_path: Path) -> None:
    notes: list[str] = []
    with start_fake(tmp_path, "own", 0.001) as own, start_fake(tmp_path, "peer", 0.002) as peer:
        rows = compare_steps(
            own,
            peer,
            FakePrompts(),  # type: ignore[arg-type]
            batches=(1, 2),
            contexts=(10,),
            runs=3,
            steps=2,
            note=notes.append,
        )
    assert [(row["concurrency"], row["context"]) for row in rows] == [(1, 10), (2, 10)]
    assert [(row["ours"], row["peer"]) for row in rows] == [(10, 20), (20, 40)]
    assert [row["ratio"] for row in rows] == [0.5, 0.5]
    assert len(notes) == 2
    assert "noise" in (tmp_path / "own.log").read_text()


def test_a_step_process_that_ends_is_reported_with_its_log(tmp_path: Path) -> None:
    with start_fake(tmp_path, "own", 0.1) as server:
        server.fill([[1]] * 3, 5)
        with pytest.raises(DsparkError, match=r"three is too many.*own\.log"):
            server.steps(3)


@pytest.fixture
def tiny(tmp_path: Path) -> OwnSettings:
    return OwnSettings(
        target=save_tiny_target(tmp_path),
        drafter=None,
        dtype="float32",
        num_threads=1,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        kv_cache_memory_mb=1,
        enforce_eager=True,
    )


def test_our_engine_steps(tiny: OwnSettings) -> None:
    program = OwnSteps(tiny.values())
    for size in (1, 3):
        program.fill([[7] * 9] * size, 12)
        seconds = program.steps(4)
        assert len(seconds) == 4
        assert all(0 < value < 10 for value in seconds)
        program.clear()
    program.fill([[7] * 9], 3)
    with pytest.raises(RuntimeError, match="one token of every request"):
        program.steps(4)


def test_the_terms_of_a_round(tiny: OwnSettings, tmp_path: Path) -> None:
    drafter = save_tiny_drafter(tmp_path / "drafter", tiny.target)
    settings = replace(tiny, drafter=DrafterChoice.parse(f"dspark={drafter}"), scheduler="full")
    argument = {
        "values": settings.values(),
        "prompts": [[7] * 9] * 2,
        "max_tokens": 24,
        "verify_tokens": 3,
    }
    terms = round_terms.main(argument)
    assert 0 < terms["draft_s"] < 1
    assert 0 < terms["verify_s"] < 1
    with pytest.raises(RuntimeError, match="rounds were drafted"):
        round_terms.main({**argument, "max_tokens": 1})


@pytest.mark.slow
def test_our_engine_steps_in_a_process(tiny: OwnSettings, tmp_path: Path) -> None:
    with start_own_steps(tiny, tmp_path / "own.log") as server:
        server.fill([[7] * 9] * 2, 12)
        assert len(server.steps(4)) == 4
        server.clear()
        with pytest.raises(DsparkError, match="prompt"):
            server.fill([[]], 3)
