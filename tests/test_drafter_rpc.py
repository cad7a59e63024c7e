"""Drafters over gRPC: real servers and real clients."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from cluster.config import DrafterConfig
from cluster.engine.draft_client import DraftOutcome, DraftSampling, SessionKey
from cluster.engine.draft_loop import MAX_QUEUED_CHUNKS_PER_REPLICA
from cluster.rpc.channels import PROTOCOL_VERSION, channel_options
from cluster.rpc.draft_messages import encode_digests
from cluster.rpc.drafter_server import DrafterServer
from cluster.v1 import drafter_pb2, drafter_pb2_grpc
from tests.draft_helpers import (
    BLOCK,
    D,
    append,
    feed,
    make_drafter,
    make_engine,
    round_of,
    sequence,
)
from tests.drafter_rpc_tools import (
    DIGESTS,
    GREEDY,
    REPOSITORY,
    SAMPLED,
    LoopThread,
    client_of,
    features,
    open_with,
    served,
    state_of,
    wait_for,
)


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


def test_a_round_over_grpc_equals_one_in_process(loop):
    local = make_engine(make_drafter())
    engine = make_engine(make_drafter())
    samplings = [GREEDY, DraftSampling(temperature=0.7, seed=5), GREEDY]
    with served(loop, engine) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        assert client.block_size == BLOCK
        keys = [open_with(client, f"r{i}", 9 + i, s) for i, s in enumerate(samplings)]
        for i, key in enumerate(keys):
            local.open("local", key, samplings[i])
            append(local, "local", key, 0, features(9 + i))
        for step in range(3):
            draft_round = round_of(
                *(
                    sequence(key, 12 + i + 2 * step, features=features(2, step))
                    for i, key in enumerate(keys)
                )
            )
            (expected,) = local.draft([("local", draft_round)])
            results = client.collect(client.start_round(draft_round), 5.0)
            assert [result.session for result in results] == keys
            for ours, theirs in zip(results, expected, strict=True):
                assert ours.outcome is DraftOutcome.DRAFTED
                assert ours.proposal.draft_token_ids == theirs.proposal.draft_token_ids
        assert client.stats.num_rounds == 3
        assert client.stats.round_trip_s > client.stats.network_s > 0
        for key in keys:
            client.close_session(key)
        assert wait_for(lambda: engine.num_sessions == 0)
        engine.check_integrity()


def test_the_law_arrives_bit_for_bit(loop):
    engine = make_engine(make_drafter())
    with served(loop, engine) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9, SAMPLED)
        draft_round = round_of(sequence(key, 10, count=3))
        (result,) = client.collect(client.start_round(draft_round), 5.0)
        (again,) = client.collect(client.start_round(draft_round), 5.0)
        ((kept,),) = engine.draft([("replica", draft_round)])
        for proposal in (result.proposal, again.proposal):
            assert proposal.draft_token_ids == kept.proposal.draft_token_ids
            assert (proposal.draft_prob_values == kept.proposal.draft_prob_values).all()
            assert (proposal.draft_prob_token_ids == kept.proposal.draft_prob_token_ids).all()


def test_two_replicas_share_a_drafter_and_nothing_else(loop):
    engine = make_engine(make_drafter())
    with (
        served(loop, engine, session_grace_s=0.1) as (_, address),
        client_of(address, replica_id="a") as one,
        client_of(address, replica_id="b") as two,
    ):
        assert wait_for(one.is_ready)
        assert wait_for(two.is_ready)
        key = open_with(one, "r", 9)
        assert open_with(two, "r", 12) == key
        for _ in range(3):
            handles = [
                (client, client.start_round(round_of(sequence(key, length))))
                for client, length in ((one, 10), (two, 13))
            ]
            for client, handle in handles:
                (result,) = client.collect(handle, 5.0)
                assert result.outcome is DraftOutcome.DRAFTED
        assert engine.num_sessions == 2
        one.close()  # its sessions are forgotten after the grace
        assert wait_for(lambda: engine.num_sessions == 1)
        assert two.has_session(key)
        two.close()
        assert wait_for(lambda: engine.num_sessions == 0)
        engine.check_integrity()


def test_missing_features_are_asked_for_and_fed(loop):
    engine = make_engine(make_drafter())
    with served(loop, engine) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9)
        draft_round = round_of(sequence(key, 20, features=features(2)))
        (result,) = client.collect(client.start_round(draft_round), 5.0)
        assert (result.outcome, result.missing_from) == (DraftOutcome.MISSING, 9)
        assert feed(client, key, 9, features(10)) == 10
        assert wait_for(lambda: client.acknowledged_length(key) == 19)
        (result,) = client.collect(client.start_round(draft_round), 5.0)
        assert result.outcome is DraftOutcome.DRAFTED
        # The drafter forgets it (evicted, say): a new epoch is needed.
        engine.close("replica", key)
        (result,) = client.collect(client.start_round(round_of(sequence(key, 20))), 5.0)
        assert result.outcome is DraftOutcome.UNKNOWN_SESSION
        assert not client.has_session(key)
        assert client.collect(client.start_round(round_of(sequence(key, 20))), 5.0) == []


def test_sessions_spread_over_drafters_and_rounds_are_split(loop):
    engines = [make_engine(make_drafter()) for _ in range(2)]
    with (
        served(loop, engines[0]) as (_, one),
        served(loop, engines[1]) as (_, two),
        client_of(one, two) as client,
    ):
        assert wait_for(lambda: sum(s.state == "ready" for s in client.status()) == 2)
        keys = [open_with(client, f"r{i}", 5 + i) for i in range(4)]
        assert [engine.num_sessions for engine in engines] == [2, 2]
        draft_round = round_of(
            *(sequence(key, 8 + i, features=features(2)) for i, key in enumerate(keys))
        )
        results = client.collect(client.start_round(draft_round), 5.0)
        assert {result.session for result in results} == set(keys)
        assert all(result.outcome is DraftOutcome.DRAFTED for result in results)


def test_a_drafter_that_leaves_drafts_until_its_sessions_have_moved(loop):
    engines = [make_engine(make_drafter()) for _ in range(2)]
    with (
        served(loop, engines[0]) as (first, one),
        served(loop, engines[1]) as (_, two),
        client_of(one) as client,
    ):
        assert wait_for(client.is_ready)
        keys = [open_with(client, f"r{i}", 5) for i in range(3)]
        draft_round = round_of(*(sequence(key, 6) for key in keys))
        client.set_drafters([])
        assert wait_for(lambda: state_of(client) == "draining")
        assert client.is_ready()
        assert not client.open_session(SessionKey("new", 0), GREEDY)
        stopping = loop.start(first.drain(hand_over_s=60.0))
        results = client.collect(client.start_round(draft_round), 5.0)
        assert [result.outcome for result in results] == [DraftOutcome.DRAFTED] * 3
        assert all(client.has_session(key) for key in keys)  # there is no other drafter
        client.set_drafters([("d1", two)])
        assert wait_for(lambda: "ready" in {status.state for status in client.status()})
        num_moved = 0
        deadline = time.monotonic() + 60
        while num_moved < 3:
            assert time.monotonic() < deadline
            assert not stopping.done()
            results = client.collect(
                client.start_round(round_of(*(sequence(key, 6) for key in keys))), 5.0
            )
            assert len(results) == 3  # nobody is without drafts meanwhile
            for index, key in enumerate(keys):
                if not client.has_session(key):  # as the engine does it
                    num_moved += 1
                    client.close_session(key)
                    keys[index] = moved = SessionKey(key.request_id, 1)
                    assert client.open_session(moved, GREEDY)
                    feed(client, moved, 0, features(5))
                    assert wait_for(lambda moved=moved: client.acknowledged_length(moved) == 5)
            time.sleep(0.02)
        assert wait_for(lambda: engines[1].num_sessions == 3)
        stopping.result(10)
        assert wait_for(lambda: [status.state for status in client.status()] == ["ready"])
        assert client.stats.num_lost == 0


def test_a_drafter_that_leaves_without_another_ends_with_its_sessions(loop):
    engine = make_engine(make_drafter())
    with served(loop, engine) as (server, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 5)
        client.set_drafters([])
        stopping = loop.start(server.drain(hand_over_s=60.0))
        assert wait_for(lambda: state_of(client) == "draining")
        assert len(client.collect(client.start_round(round_of(sequence(key, 6))), 5.0)) == 1
        client.close_session(key)
        stopping.result(10)
        assert wait_for(lambda: state_of(client) == "none")
        assert not client.is_ready()


def test_feed_takes_no_more_chunks_than_a_drafter_queues(loop):
    engine = make_engine(make_drafter(), max_sessions=4096)
    with served(loop, engine) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        keys = [SessionKey(f"r{i}", 0) for i in range(MAX_QUEUED_CHUNKS_PER_REPLICA + 500)]
        assert all(client.open_session(key, GREEDY) for key in keys)
        rows = features(2)
        left, deadline = keys, time.monotonic() + 60
        while left and time.monotonic() < deadline:
            left = [key for key in left if feed(client, key, 0, rows) == 0]
            time.sleep(0.01)
        assert not left
        assert wait_for(lambda: all(client.acknowledged_length(key) == 2 for key in keys))


def test_feed_takes_no_more_than_the_credit(loop):
    row_bytes = D * 4
    engine = make_engine(make_drafter(max_positions=8192), kv_cache_memory_mb=8)
    with (
        served(loop, engine, feed_credit_bytes=64 * row_bytes) as (_, address),
        client_of(address) as client,
    ):
        assert wait_for(client.is_ready)
        key = SessionKey("r", 0)
        rows = features(3000)
        assert client.open_session(key, GREEDY)
        taken, calls = 0, 0
        while taken < len(rows):
            took = feed(client, key, taken, rows[taken:])
            assert took <= 64
            taken += took
            calls += took > 0
            if took == 0:
                time.sleep(0.001)
        assert calls >= len(rows) / 64
        assert wait_for(lambda: client.acknowledged_length(key) == len(rows))
        assert engine.length_of("replica", key) == len(rows)


def test_closing_in_the_middle_of_a_feed_leaves_no_session_behind(loop):
    engine = make_engine(make_drafter(max_positions=8192), kv_cache_memory_mb=8)
    with served(loop, engine) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        for index in range(20):
            key = SessionKey(f"r{index}", 0)
            assert client.open_session(key, GREEDY)
            feed(client, key, 0, features(3000))
            client.close_session(key)
            assert not client.has_session(key)
        assert wait_for(lambda: engine.num_sessions == 0)
        last = open_with(client, "last", 5)
        client.close_session(last)
        assert wait_for(lambda: engine.num_sessions == 0)
        engine.check_integrity()


def test_mismatch_is_a_state_with_a_reason(loop):
    engine = make_engine(make_drafter())
    with (
        served(loop, engine, digests={**DIGESTS, "drafter": "other"}) as (server, address),
        client_of(address) as client,
    ):
        assert wait_for(lambda: state_of(client) == "mismatched")
        assert "drafter" in client.status()[0].reason
        assert client.stats.num_mismatched == 1
        assert not client.is_ready()
        assert client.block_size == 0
        assert not client.open_session(SessionKey("r", 0), GREEDY)
        # The wire tells it with details, behind the drafter's own welcome.
        with grpc.insecure_channel(address, options=channel_options()) as channel:
            hello = drafter_pb2.DraftRequest.Hello(
                replica_id="x", protocol_version=PROTOCOL_VERSION, digests=encode_digests(DIGESTS)
            )
            call = drafter_pb2_grpc.DrafterServiceStub(channel).Draft(
                iter([drafter_pb2.DraftRequest(hello=hello)])
            )
            assert next(call).welcome.digests.drafter == "other"
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            info = error_details_pb2.ErrorInfo()
            assert rpc_status.from_call(caught.value).details[0].Unpack(info)
            assert info.metadata["differs"] == "drafter"
        assert server.num_streams == 0


def test_health_and_reflection(loop):
    with (
        served(loop, make_engine(make_drafter())) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "cluster.v1.DrafterService"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = stub.ServerReflectionInfo(iter([request]))
        names = {service.name for service in reply.list_services_response.service}
        assert "cluster.v1.DrafterService" in names


def test_a_configured_port_range_is_searched(loop):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        config = DrafterConfig(port=first, num_ports=20)
        server = DrafterServer(
            make_engine(make_drafter()), drafter_id="d", digests=DIGESTS, config=config
        )
        port = loop.run(server.start("127.0.0.1"))
        loop.run(server.drain(0.1))
        assert first < port < first + 20


def test_drain_ends_streams_and_sessions_move(loop):
    engines = [make_engine(make_drafter()) for _ in range(2)]
    with (
        served(loop, engines[0]) as (first, one),
        served(loop, engines[1]) as (_, two),
        client_of(one) as client,
    ):
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9)
        client.set_drafters([("d0", one), ("d1", two)])
        assert wait_for(lambda: sum(s.state == "ready" for s in client.status()) == 2)
        loop.run(first.drain(0.2))
        assert wait_for(lambda: not client.has_session(key))
        assert client.is_ready()
        client.close_session(key)
        moved = SessionKey("r", 1)
        assert client.open_session(moved, GREEDY)
        feed(client, moved, 0, features(9))
        assert wait_for(lambda: client.acknowledged_length(moved) == 9)
        (result,) = client.collect(client.start_round(round_of(sequence(moved, 10))), 5.0)
        assert result.outcome is DraftOutcome.DRAFTED


def test_a_restarted_drafter_is_found_again_without_its_old_state(loop):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = SessionKey("r", 0)
    with client_of(f"127.0.0.1:{port}") as client:
        for epoch in range(3):
            engine = make_engine(make_drafter())
            server = DrafterServer(
                engine, drafter_id="d", digests=DIGESTS, config=DrafterConfig(port=port)
            )
            assert loop.run(server.start("127.0.0.1")) == port
            assert wait_for(client.is_ready)
            assert server.is_healthy
            assert not client.has_session(key)
            client.close_session(key)
            key = SessionKey("r", epoch)
            assert client.open_session(key, GREEDY)
            assert feed(client, key, 0, features(9)) == 9
            assert wait_for(lambda key=key: client.acknowledged_length(key) == 9)
            (result,) = client.collect(client.start_round(round_of(sequence(key, 10))), 5.0)
            assert result.outcome is DraftOutcome.DRAFTED
            loop.run(server.drain(0.1))
            assert wait_for(lambda: state_of(client) == "lost")
            assert not server.is_healthy


def test_nothing_is_left_behind(loop):
    threads = threading.active_count()
    engine = make_engine(make_drafter())
    with served(loop, engine) as (server, address):
        for _ in range(3):
            with client_of(address) as client:
                assert wait_for(client.is_ready)
                open_with(client, "r", 9)
        assert wait_for(lambda: server.num_streams == 0)
    assert wait_for(lambda: threading.active_count() <= threads + 1)  # gRPC's poller stays
    assert not [t for t in threading.enumerate() if t.name in ("draft-loop", "drafter-client")]


def test_a_client_may_share_an_event_loop(loop):
    engine = make_engine(make_drafter())
    with served(loop, engine) as (_, address), client_of(address, event_loop=loop.loop) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9)
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10))), 5.0)
        assert result.outcome is DraftOutcome.DRAFTED
        assert not [t for t in threading.enumerate() if t.name == "drafter-client"]


@pytest.fixture
def drafter_process(tmp_path) -> Iterator[tuple[subprocess.Popen, str]]:
    path = tmp_path / "port"
    code = f"from tests.drafter_rpc_tools import serve_forever; serve_forever({str(path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        assert wait_for(path.exists, 120)
        yield process, f"127.0.0.1:{path.read_text()}"
    finally:
        process.kill()
        process.wait()


def test_a_stopped_then_killed_drafter(drafter_process):
    process, address = drafter_process
    with client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9)
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10))), 5.0)
        assert result.outcome is DraftOutcome.DRAFTED
        # Stopped in the middle of a round, then killed: whoever waits is told at once.
        process.send_signal(signal.SIGSTOP)
        handle = client.start_round(round_of(sequence(key, 11, features=features(1))))
        killer = threading.Timer(0.2, process.kill)
        killer.start()
        started = time.monotonic()
        assert client.collect(handle, 60.0) == []
        assert time.monotonic() - started < 30.0
        killer.join()
        assert wait_for(lambda: state_of(client) == "lost")
        assert "UNAVAILABLE" in client.status()[0].reason
        assert not client.has_session(key)
        assert client.block_size == 0
        assert client.stats.num_lost == 1
