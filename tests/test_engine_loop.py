"""The engine's thread: every request is answered, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.engine.loop import EngineLoop
from cluster.errors import InvalidRequestError, ReplicaLostError, RequestCancelledError
from cluster.request import Request, RequestOutput, SamplingParams
from tests.engine_tools import make_config, make_engine
from tests.models import save_tiny_target

PARAMS = SamplingParams(temperature=0.0, max_tokens=40)


class Answers:
    """Collects outputs and waits for the last ones."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self._arrived = threading.Condition()

    def __call__(self, outputs: list[RequestOutput]) -> None:
        with self._arrived:
            self.outputs += outputs
            self._arrived.notify_all()

    def last(self, request_id: str, timeout_s: float = 30.0) -> RequestOutput:
        def ended() -> list[RequestOutput]:
            return [o for o in self.outputs if o.request_id == request_id and o.is_last]

        with self._arrived:
            assert self._arrived.wait_for(ended, timeout_s), f"{request_id} was never answered"
            found = ended()
        assert len(found) == 1
        return found[0]


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def loop(tmp_path: Path, answers: Answers) -> Iterator[EngineLoop]:
    engine = make_engine(make_config(save_tiny_target(tmp_path / "target")))
    loop = EngineLoop(engine, answers)
    loop.start()
    yield loop
    loop.stop()


def make_request(name: str, **changes: object) -> Request:
    return Request(request_id=name, prompt_token_ids=(1, 2, 3), sampling=PARAMS, **changes)  # type: ignore[arg-type]


def test_requests_are_answered_and_the_loop_goes_idle(loop: EngineLoop, answers: Answers) -> None:
    for i in range(5):
        loop.submit(make_request(f"r{i}"))
    for i in range(5):
        assert answers.last(f"r{i}").finish_reason is not None
    loop.submit(make_request("bad", choice_index=0, resume_token_ids=(9999,)))
    assert isinstance(answers.last("bad").error, InvalidRequestError)
    assert loop.load().num_output_tokens == 5 * 40
    assert loop.load().kv_cache_usage == 0.0
    assert loop.failure is None


def test_an_idle_engine_notices_a_page_that_was_lost(
    loop: EngineLoop, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.engine.loop._IDLE_WAIT_S", 0.01)
    loop.engine._pages.grow([], 1)
    loop.submit(make_request("r"))
    assert answers.last("r").finish_reason is not None
    loop._thread.join(10)
    assert "nobody holds" in str(loop.failure)


def test_cancel_reaches_the_engine(loop: EngineLoop, answers: Answers) -> None:
    loop.submit(make_request("r"))
    loop.cancel("r", RequestCancelledError("the client left"))
    assert isinstance(answers.last("r").error, RequestCancelledError)
    loop.cancel("unknown", RequestCancelledError("nobody"))
    loop.submit(make_request("next"))
    assert answers.last("next").finish_reason is not None


def test_a_broken_engine_answers_everyone_and_stops(
    loop: EngineLoop, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[RequestOutput]:
        raise RuntimeError("a shard is gone")

    monkeypatch.setattr(loop.engine, "step", broken)
    loop.submit(make_request("r"))
    assert isinstance(answers.last("r").error, ReplicaLostError)
    loop.stop()
    assert isinstance(loop.failure, RuntimeError)
    loop.submit(make_request("after"))
    assert isinstance(answers.last("after").error, ReplicaLostError)


def test_stopping_answers_what_is_unfinished(loop: EngineLoop, answers: Answers) -> None:
    loop.submit(make_request("r"))
    loop.stop()
    assert answers.last("r").is_last


def test_a_swap_waits_for_no_request(loop: EngineLoop, answers: Answers) -> None:
    loop.engine._runner.shard.stage_features(None)
    loop.submit(make_request("r"))
    assert loop.swap_drafter(None, None).result(30) is None
    assert answers.last("r").error is None


def test_a_swap_is_answered_whatever_happens(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("no features are staged")

    monkeypatch.setattr(loop.engine, "swap_drafter", break_down)
    waiting = [loop.swap_drafter(None, None), loop.swap_drafter(None, None)]
    assert isinstance(waiting[0].exception(30), RuntimeError)
    assert isinstance(waiting[1].exception(30), ReplicaLostError)
    assert isinstance(loop.failure, RuntimeError)
    assert isinstance(loop.swap_drafter(None, None).exception(30), ReplicaLostError)


def test_a_swap_that_nobody_waits_for_hides_no_failure(
    loop: EngineLoop, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_posted = threading.Event()

    def break_down(*_: object) -> None:
        is_posted.wait(30)
        raise RuntimeError("no features are staged")

    monkeypatch.setattr(loop.engine, "swap_drafter", break_down)
    loop.swap_drafter(None, None)
    assert loop.swap_drafter(None, None).cancel()
    loop.submit(make_request("r"))
    is_posted.set()
    assert isinstance(answers.last("r").error, ReplicaLostError)
