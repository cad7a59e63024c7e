"""Sessions go to drafters that come, and leave those that go, under running requests."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from cluster.config import ClusterConfig
from cluster.engine.draft_client import SessionKey
from cluster.engine.draft_factory import build_draft_engine
from cluster.request import Request, SamplingParams
from cluster.rpc.session_balance import SessionBalance
from tests.draft_helpers import feed, make_drafter, round_of, sequence
from tests.draft_helpers import make_engine as make_draft_engine
from tests.drafter_rpc_tools import (
    DIGESTS,
    GREEDY,
    LoopThread,
    PatientDraftClient,
    client_of,
    features,
    open_with,
    served,
    wait_for,
)
from tests.engine_tools import Completion, make_config, make_engine, run
from tests.models import save_tiny_drafter, save_tiny_target


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ClusterConfig:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny_target(folder / "target")
    drafter = save_tiny_drafter(folder / "drafter", target)
    return make_config(target, drafter, speculative={"draft_timeout_ms": 20_000})


def test_a_drafter_that_comes_gets_its_share_a_few_at_a_time(loop: LoopThread) -> None:
    engines = [make_draft_engine(make_drafter()) for _ in range(2)]
    with (
        served(loop, engines[0]) as (_, one),
        served(loop, engines[1]) as (_, two),
        client_of(one) as client,
    ):
        assert wait_for(client.is_ready)
        keys = [open_with(client, f"r{i}", 5) for i in range(8)]
        client.set_drafters([("d0", one), ("d1", two)])
        assert wait_for(lambda: sum(s.state == "ready" for s in client.status()) == 2)
        lengths = dict.fromkeys(keys, 6)
        num_left = 0
        deadline = time.monotonic() + 60
        while num_left < 4:
            assert time.monotonic() < deadline
            joining = [key for key in keys if client.acknowledged_length(key) == lengths[key] - 1]
            asked = round_of(*(sequence(key, lengths[key]) for key in joining))
            client.collect(client.start_round(asked), 5.0)
            leaving = [key for key in keys if not client.has_session(key)]
            assert len(leaving) <= 1
            for key in leaving:  # as the engine does it
                client.close_session(key)
                moved = SessionKey(key.request_id, key.epoch + 1)
                assert client.open_session(moved, GREEDY)
                feed(client, moved, 0, features(5))
                keys[keys.index(key)] = moved
                lengths[moved] = lengths.pop(key)
            num_left += len(leaving)
            time.sleep(0.02)
        assert wait_for(lambda: [engine.num_sessions for engine in engines] == [4, 4])
        for _ in range(5):
            time.sleep(0.1)
            asked = round_of(*(sequence(key, lengths[key]) for key in keys))
            client.collect(client.start_round(asked), 5.0)
            assert all(client.has_session(key) for key in keys)


def _requests() -> list[Request]:
    greedy = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
    return [
        Request(
            request_id=f"r{i}",
            prompt_token_ids=(i, i + 1, i + 2),
            sampling=greedy
            if i % 2
            else SamplingParams(temperature=0.9, seed=i, max_tokens=120, ignore_eos=True),
        )
        for i in range(6)
    ]


def test_requests_go_on_while_drafters_come_and_go(loop: LoopThread, config: ClusterConfig) -> None:
    plain = run(make_engine(config.model_copy(update={"speculative": None})), _requests())
    assert config.speculative is not None
    engines = [build_draft_engine(config) for _ in range(2)]
    with served(loop, engines[0]) as (_, one), served(loop, engines[1]) as (_, two):
        client = PatientDraftClient(
            replica_id="replica", digests=DIGESTS, vocab_size=96, config=config.speculative
        )
        client.set_drafters([("d0", one)])
        assert wait_for(client.is_ready)
        engine = make_engine(config, client)
        completions = {request.request_id: Completion() for request in _requests()}
        for request in _requests():
            engine.add_request(request)
        most_on_second = 0
        num_steps = 0
        while engine.has_work:
            num_steps += 1
            if num_steps == 5:
                client.set_drafters([("d0", one), ("d1", two)])
            if 5 < num_steps < 40:
                time.sleep(0.05)  # time for a few balances
            if num_steps == 40:
                client.set_drafters([("d1", two)])
            most_on_second = max(most_on_second, engines[1].num_sessions)
            for output in engine.step():
                completions[output.request_id].token_ids += output.token_ids
                assert output.error is None
        engine.check()
        engine.close()
    assert most_on_second >= 2
    for request_id, completion in plain.items():
        assert completions[request_id].token_ids == completion.token_ids


def test_without_drafters_nothing_leaves() -> None:
    assert list(SessionBalance("here").leaving([], [], 1.0)) == []
