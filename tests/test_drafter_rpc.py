"""Drafters over gRPC: a real server, a real client, and hostile ones of either kind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from cluster.config import DrafterConfig, SpeculativeConfig
from cluster.engine.draft_client import DraftOutcome, DraftSampling, SessionKey
from cluster.engine.draft_engine import DraftEngine
from cluster.errors import InvalidRequestError
from cluster.rpc.channels import PROTOCOL_VERSION, channel_options
from cluster.rpc.draft_messages import encode_digests
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.drafter_server import DrafterServer
from cluster.rpc.tensors import decode_tensor, encode_tensor
from cluster.v1 import common_pb2, drafter_pb2, drafter_pb2_grpc
from tests.draft_helpers import BLOCK, VOCAB, D, make_drafter, make_engine, round_of, sequence

DIGESTS = {"target": "t", "tokenizer": "k", "drafter": "d", "projection": "p"}
GREEDY = DraftSampling(temperature=0.0)
SAMPLED = DraftSampling(temperature=1.0, send_probs=True)
REPOSITORY = Path(__file__).resolve().parents[1]
SPECULATIVE = SpeculativeConfig(model="none")


class LoopThread:
    """An event loop in a thread, where a test's servers run."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine, timeout_s: float = 20.0):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


@contextmanager
def served(
    loop: LoopThread, engine: DraftEngine, *, digests: dict[str, str] = DIGESTS, **options
) -> Iterator[tuple[DrafterServer, str]]:
    """A running server and its address."""
    server = DrafterServer(
        engine, drafter_id="d0", digests=digests, config=DrafterConfig(), **options
    )
    port = loop.run(server.start("127.0.0.1"))
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        loop.run(server.drain(0.1))


@contextmanager
def client_of(*addresses: str, replica_id: str = "replica", **options) -> Iterator[GrpcDraftClient]:
    client = GrpcDraftClient(
        replica_id=replica_id, digests=DIGESTS, vocab_size=VOCAB, config=SPECULATIVE, **options
    )
    try:
        client.set_drafters([(f"d{i}", address) for i, address in enumerate(addresses)])
        yield client
    finally:
        client.close()


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def state_of(client: GrpcDraftClient) -> str:
    statuses = client.status()
    return statuses[0].state if statuses else "none"


def features(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, D, generator=torch.Generator().manual_seed(seed))


def open_with(
    client: GrpcDraftClient, name: str, length: int, sampling: DraftSampling = GREEDY
) -> SessionKey:
    key = SessionKey(name, 0)
    assert client.open_session(key, sampling)
    assert client.feed(key, 0, features(length)) == length
    assert wait_for(lambda: client.acknowledged_length(key) == length)
    return key


# ------------------------------------------------------------------------------- real parts


def test_a_round_over_grpc_equals_one_in_process(loop):
    local = make_engine(make_drafter())
    engine = make_engine(make_drafter())
    samplings = [GREEDY, DraftSampling(temperature=0.7, seed=5), GREEDY]
    with served(loop, engine) as (_, address), client_of(address) as client:
        assert client.wait_until_ready(10)
        assert client.block_size == BLOCK
        keys = [open_with(client, f"r{i}", 9 + i, s) for i, s in enumerate(samplings)]
        for i, key in enumerate(keys):
            local.open("local", key, samplings[i])
            local.append_features("local", key, 0, features(9 + i))
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
        assert client.wait_until_ready(10)
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
        assert one.wait_until_ready(10)
        assert two.wait_until_ready(10)
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
        assert client.wait_until_ready(10)
        key = open_with(client, "r", 9)
        draft_round = round_of(sequence(key, 20, features=features(2)))
        (result,) = client.collect(client.start_round(draft_round), 5.0)
        assert (result.outcome, result.missing_from) == (DraftOutcome.MISSING, 9)
        assert client.feed(key, 9, features(10)) == 10
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
        client.set_drafters([("d1", two)])  # one is taken away, its sessions with it
        assert wait_for(lambda: sum(client.has_session(key) for key in keys) == 2)
        results = client.collect(client.start_round(draft_round), 5.0)
        assert len(results) == 2


def test_feed_takes_no_more_than_the_credit(loop):
    row_bytes = D * 4
    engine = make_engine(make_drafter(max_positions=8192), kv_cache_memory_mb=8)
    with (
        served(loop, engine, feed_credit_bytes=64 * row_bytes) as (_, address),
        client_of(address) as client,
    ):
        assert client.wait_until_ready(10)
        key = SessionKey("r", 0)
        rows = features(3000)
        assert client.open_session(key, GREEDY)
        taken, calls = 0, 0
        while taken < len(rows):
            took = client.feed(key, taken, rows[taken:])
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
        assert client.wait_until_ready(10)
        for index in range(20):
            key = SessionKey(f"r{index}", 0)
            assert client.open_session(key, GREEDY)
            client.feed(key, 0, features(3000))
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
        assert client.wait_until_ready(10)
        key = open_with(client, "r", 9)
        client.set_drafters([("d0", one), ("d1", two)])
        assert wait_for(lambda: sum(s.state == "ready" for s in client.status()) == 2)
        loop.run(first.drain(0.2))
        assert wait_for(lambda: not client.has_session(key))
        assert client.is_ready()
        client.close_session(key)
        moved = SessionKey("r", 1)
        assert client.open_session(moved, GREEDY)
        client.feed(moved, 0, features(9))
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
            assert client.wait_until_ready(10)
            assert server.is_healthy
            assert not client.has_session(key)
            client.close_session(key)
            key = SessionKey("r", epoch)
            assert client.open_session(key, GREEDY)
            assert client.feed(key, 0, features(9)) == 9
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
                assert client.wait_until_ready(10)
                open_with(client, "r", 9)
        assert wait_for(lambda: server.num_streams == 0)
    assert wait_for(lambda: threading.active_count() <= threads + 1)  # gRPC's poller stays
    assert not [t for t in threading.enumerate() if t.name in ("draft-loop", "drafter-client")]


def test_a_client_may_share_an_event_loop(loop):
    engine = make_engine(make_drafter())
    with served(loop, engine) as (_, address), client_of(address, event_loop=loop.loop) as client:
        assert client.wait_until_ready(10)
        key = open_with(client, "r", 9)
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10))), 5.0)
        assert result.outcome is DraftOutcome.DRAFTED
        assert not [t for t in threading.enumerate() if t.name == "drafter-client"]


# --------------------------------------------------------------------- clients that misbehave


def hello_request() -> drafter_pb2.DraftRequest:
    return drafter_pb2.DraftRequest(
        hello=drafter_pb2.DraftRequest.Hello(
            replica_id="x", protocol_version=PROTOCOL_VERSION, digests=encode_digests(DIGESTS)
        )
    )


def feed_hello() -> drafter_pb2.FeedRequest:
    return drafter_pb2.FeedRequest(
        hello=drafter_pb2.FeedRequest.Hello(replica_id="x", protocol_version=PROTOCOL_VERSION)
    )


def a_round(**changes) -> drafter_pb2.DraftRequest:
    values = {
        "session": drafter_pb2.SessionKey(request_id="r", epoch=0),
        "committed_length": 5,
        "num_features": 2,
        "new_token_ids": [1],
        "num_speculative_tokens": BLOCK,
    }
    tensor = changes.pop("features", encode_tensor(torch.zeros(2, D)))
    count = changes.pop("count", 1)
    parts = [drafter_pb2.DraftRequest.Sequence(**{**values, **changes}) for _ in range(count)]
    return drafter_pb2.DraftRequest(
        round=drafter_pb2.DraftRequest.Round(round_id=1, sequences=parts, features=tensor)
    )


def a_chunk(**changes) -> drafter_pb2.FeedRequest:
    values = {
        "session": drafter_pb2.SessionKey(request_id="r", epoch=0),
        "start": 0,
        "features": encode_tensor(torch.zeros(2, D)),
        "sampling": drafter_pb2.FeedRequest.DraftSampling(temperature=1.0, top_p=1.0),
    }
    return drafter_pb2.FeedRequest(chunk=drafter_pb2.FeedRequest.Chunk(**{**values, **changes}))


def tensor_of(shape: list[int], data: bytes, dtype: int = 1) -> common_pb2.Tensor:
    return common_pb2.Tensor(dtype=dtype, shape=shape, data=data)


BAD_DRAFTS = {
    "no greeting": ([a_round()], "hello"),
    "two greetings": ([hello_request(), hello_request()], "message"),
    "empty": ([hello_request(), drafter_pb2.DraftRequest()], "message"),
    "length": ([hello_request(), a_round(committed_length=0)], "sequence.committed_length"),
    "features": ([hello_request(), a_round(num_features=5)], "sequence.num_features"),
    "negative": ([hello_request(), a_round(num_features=-1)], "sequence.num_features"),
    "block": (
        [hello_request(), a_round(num_speculative_tokens=BLOCK + 1)],
        "sequence.num_speculative_tokens",
    ),
    "tokens": ([hello_request(), a_round(new_token_ids=[VOCAB])], "sequence.new_token_ids"),
    "no anchor": ([hello_request(), a_round(new_token_ids=[])], "sequence.new_token_ids"),
    "no session": (
        [hello_request(), a_round(session=drafter_pb2.SessionKey())],
        "session.request_id",
    ),
    "twice": (
        [hello_request(), a_round(count=2, features=encode_tensor(torch.zeros(4, D)))],
        "round.sequences",
    ),
    "rows": (
        [hello_request(), a_round(features=encode_tensor(torch.zeros(3, D)))],
        "round.features",
    ),
    "nan": (
        [hello_request(), a_round(features=encode_tensor(torch.full((2, D), torch.nan)))],
        "round.features",
    ),
    "bytes": ([hello_request(), a_round(features=tensor_of([2, D], b"123"))], "round.features"),
    "huge": (
        [hello_request(), a_round(features=tensor_of([2**62, 2**62], b""))],
        "round.features",
    ),
    "dtype": (
        [hello_request(), a_round(features=encode_tensor(torch.zeros(2, D, dtype=torch.int32)))],
        "round.features",
    ),
}


def field_of(error: grpc.RpcError) -> str:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[0].Unpack(info)
    return info.metadata["field"]


def test_bad_rounds_end_their_stream_with_the_fields_name(loop):
    engine = make_engine(make_drafter())
    with served(loop, engine) as (_, address), client_of(address) as client:
        assert client.wait_until_ready(10)
        key = open_with(client, "r", 9)
        with grpc.insecure_channel(address) as channel:
            stub = drafter_pb2_grpc.DrafterServiceStub(channel)
            for name, (messages, field) in BAD_DRAFTS.items():
                with pytest.raises(grpc.RpcError) as caught:
                    list(stub.Draft(iter(messages), timeout=10))
                assert field_of(caught.value) == field, name
        # Nobody else noticed.
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10))), 5.0)
        assert result.outcome is DraftOutcome.DRAFTED


def test_bad_features_end_their_stream_with_the_fields_name(loop):
    too_large = encode_tensor(torch.zeros(2049, D))
    bad = {
        "start": ([a_chunk(start=-1)], "chunk.start"),
        "size": ([a_chunk(features=too_large)], "chunk.features"),
        "width": ([a_chunk(features=encode_tensor(torch.zeros(2, D + 1)))], "chunk.features"),
        "sampling": ([a_chunk(sampling=None)], "chunk.sampling"),
        "temperature": (
            [a_chunk(sampling=drafter_pb2.FeedRequest.DraftSampling(temperature=-1, top_p=1))],
            "sampling.temperature",
        ),
        "other": (
            [
                a_chunk(),
                a_chunk(sampling=drafter_pb2.FeedRequest.DraftSampling(temperature=2, top_p=1)),
            ],
            "chunk.sampling",
        ),
    }
    with (
        served(loop, make_engine(make_drafter())) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = drafter_pb2_grpc.DrafterServiceStub(channel)
        for name, (messages, field) in bad.items():
            stop = threading.Event()

            def requests(messages=messages, stop=stop):
                yield feed_hello()
                yield from messages
                stop.wait(10)

            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Feed(requests(), timeout=10))
            stop.set()
            assert field_of(caught.value) == field, name


def test_more_than_the_credit_or_four_rounds_end_the_stream(loop):
    class SlowEngine(DraftEngine):
        def draft(self, rounds):
            time.sleep(0.3)
            return super().draft(rounds)

        def append_features(self, *args):
            time.sleep(0.3)
            return super().append_features(*args)

    base = make_engine(make_drafter())
    base.__class__ = SlowEngine
    with (
        served(loop, base, feed_credit_bytes=4 * D * 4) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = drafter_pb2_grpc.DrafterServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Draft(iter([hello_request(), *[a_round()] * 8]), timeout=10))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        chunks = [a_chunk(start=2 * i, sampling=None) if i else a_chunk() for i in range(6)]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Feed(iter([feed_hello(), *chunks]), timeout=10))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_failing_pass_ends_the_streams_it_hit_only(loop):
    class BrokenEngine(DraftEngine):
        def draft(self, rounds):
            if any(replica_id == "x" for replica_id, _ in rounds):
                raise RuntimeError("out of memory, say")
            return super().draft(rounds)

    engine = make_engine(make_drafter())
    engine.__class__ = BrokenEngine
    with served(loop, engine) as (_, address), client_of(address) as client:
        assert client.wait_until_ready(10)
        key = open_with(client, "r", 9)
        with grpc.insecure_channel(address) as channel:
            stub = drafter_pb2_grpc.DrafterServiceStub(channel)
            stop = threading.Event()

            def requests():
                yield hello_request()
                yield a_round()
                stop.wait(10)

            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Draft(requests(), timeout=10))
            stop.set()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10))), 5.0)
        assert result.outcome is DraftOutcome.DRAFTED


# -------------------------------------------------------------------- drafters that misbehave


class FakeDrafter(drafter_pb2_grpc.DrafterServiceServicer):
    """Answers every round with what ``answer`` makes of it (``None``: not at all)."""

    def __init__(self, answer: Callable | None) -> None:
        self.answer = answer
        self.num_streams = 0

    async def Draft(self, request_iterator, context) -> None:
        self.num_streams += 1
        await context.read()
        await context.write(
            drafter_pb2.DraftResponse(
                welcome=drafter_pb2.DraftResponse.Welcome(
                    drafter_id="fake",
                    protocol_version=PROTOCOL_VERSION,
                    digests=encode_digests(DIGESTS),
                    block_size=BLOCK,
                    vocab_size=VOCAB,
                )
            )
        )
        while (message := await context.read()) is not aio.EOF:
            if message.WhichOneof("message") != "round" or self.answer is None:
                continue
            await context.write(drafter_pb2.DraftResponse(proposals=self.answer(message.round)))

    async def Feed(self, request_iterator, context) -> None:
        await context.read()
        await context.write(
            drafter_pb2.FeedResponse(welcome=drafter_pb2.FeedResponse.Welcome(credit_bytes=1 << 20))
        )
        while (message := await context.read()) is not aio.EOF:
            rows = message.chunk.features
            ack = drafter_pb2.FeedResponse.Ack(
                session=message.chunk.session,
                length=message.chunk.start + rows.shape[0],
                credit_bytes=len(rows.data),
            )
            await context.write(drafter_pb2.FeedResponse(ack=ack))


@asynccontextmanager
async def _fake(fake: FakeDrafter) -> AsyncIterator[int]:
    server = aio.server()
    drafter_pb2_grpc.add_DrafterServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


@contextmanager
def fake_drafter(loop: LoopThread, answer: Callable | None) -> Iterator[tuple[FakeDrafter, str]]:
    fake = FakeDrafter(answer)
    manager = _fake(fake)
    port = loop.run(manager.__aenter__())
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        loop.run(manager.__aexit__(None, None, None))


def answer_with(*, round_id: int | None = None, copies: int = 1, **changes) -> Callable:
    """A valid answer to a sampled round of one sequence and two tokens, but for the changes."""

    def answer(request):
        asked = request.sequences[0]
        values = {
            "session": asked.session,
            "committed_length": asked.committed_length,
            "outcome": drafter_pb2.DraftResponse.OUTCOME_DRAFTED,
            "draft_token_ids": [4, 5],
            "confidences": [0.5, 0.25],
            "draft_prob_token_ids": encode_tensor(torch.tensor([[4, 5]] * 2, dtype=torch.int32)),
            "draft_prob_values": encode_tensor(torch.tensor([[0.5, 0.5]] * 2).half()),
        }
        proposal = drafter_pb2.DraftResponse.Proposal(**{**values, **changes})
        return drafter_pb2.DraftResponse.Proposals(
            round_id=request.round_id if round_id is None else round_id,
            proposals=[proposal] * copies,
        )

    return answer


MALFORMED = {
    "nan confidence": answer_with(confidences=[0.5, float("nan")]),
    "confidence above 1": answer_with(confidences=[0.5, 1.5]),
    "too few confidences": answer_with(confidences=[0.5]),
    "id out of range": answer_with(draft_token_ids=[4, VOCAB]),
    "negative id": answer_with(draft_token_ids=[-1, 4]),
    "too many tokens": answer_with(draft_token_ids=[4, 5, 4], confidences=[0.5] * 3),
    "no law": answer_with(draft_prob_token_ids=None, draft_prob_values=None),
    "law of other shape": answer_with(draft_prob_values=encode_tensor(torch.ones(2, 1).half())),
    "law of other dtype": answer_with(draft_prob_values=encode_tensor(torch.ones(2, 2))),
    "nan in the law": answer_with(
        draft_prob_values=encode_tensor(torch.full((2, 2), torch.nan).half())
    ),
    "token outside its law": answer_with(
        draft_prob_token_ids=encode_tensor(torch.tensor([[6, 7]] * 2, dtype=torch.int32))
    ),
    "truncated law": answer_with(draft_prob_values=tensor_of([2, 2], b"12345", 2)),
    "other length": answer_with(committed_length=3),
    "other session": answer_with(session=drafter_pb2.SessionKey(request_id="no", epoch=0)),
    "no outcome": answer_with(outcome=0),
    "missing_from": answer_with(outcome=drafter_pb2.DraftResponse.OUTCOME_MISSING, missing_from=-1),
    "twice": answer_with(copies=2),
    "none": answer_with(copies=0),
    "unknown round": answer_with(round_id=10**9),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_proposal_quarantines_its_drafter(loop, name):
    with fake_drafter(loop, MALFORMED[name]) as (_, address), client_of(address) as client:
        assert client.wait_until_ready(10)
        key = open_with(client, "r", 9, SAMPLED)
        started = time.monotonic()
        handle = client.start_round(round_of(sequence(key, 10, count=2)))
        assert client.collect(handle, 5.0) == []
        assert time.monotonic() - started < 2.0
        assert state_of(client) == "quarantined"
        assert client.status()[0].reason
        assert client.stats.num_malformed == 1
        assert not client.has_session(key)
        assert not client.is_ready()


def test_the_fakes_answer_would_be_good(loop):
    with fake_drafter(loop, answer_with()) as (_, address), client_of(address) as client:
        assert client.wait_until_ready(10)
        key = open_with(client, "r", 9, SAMPLED)
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10, count=2))), 5.0)
        assert result.proposal.draft_token_ids == (4, 5)


def test_quarantine_ends_and_grows(loop, monkeypatch):
    monkeypatch.setattr("cluster.rpc.drafter_connection.MALFORMED_QUARANTINE_S", 0.2)
    with fake_drafter(loop, MALFORMED["none"]) as (fake, address), client_of(address) as client:
        times = []
        for index in range(3):
            started = time.monotonic()
            assert client.wait_until_ready(10)
            times.append(time.monotonic() - started)
            key = open_with(client, f"r{index}", 9, SAMPLED)
            handle = client.start_round(round_of(sequence(key, 10, count=2)))
            assert client.collect(handle, 5.0) == []
        assert fake.num_streams == 3
        assert times[1] >= 0.1
        assert times[2] >= 0.2


def test_late_rounds_are_dropped_and_three_quarantine(loop):
    with fake_drafter(loop, None) as (_, address), client_of(address) as client:
        assert client.wait_until_ready(10)
        key = open_with(client, "r", 9)
        for index in range(2):
            started = time.monotonic()
            handle = client.start_round(round_of(sequence(key, 10 + index)))
            assert client.collect(handle, 0.1) == []
            assert 0.09 < time.monotonic() - started < 0.5
        assert client.is_ready()
        # Two are outstanding: the third is not sent, and nobody waits for it.
        started = time.monotonic()
        assert client.collect(client.start_round(round_of(sequence(key, 12))), 5.0) == []
        assert time.monotonic() - started < 0.1
        assert state_of(client) == "quarantined"
        assert (client.stats.num_late, client.stats.num_dropped) == (2, 1)
        assert not client.has_session(key)
        assert client.wait_until_ready(10)  # it is tried again


def test_a_late_answer_is_never_used(loop):
    delay_s = [0.3]

    def answer(request):
        time.sleep(delay_s[0])
        return answer_with()(request)

    with fake_drafter(loop, answer) as (_, address), client_of(address) as client:
        assert client.wait_until_ready(10)
        key = open_with(client, "r", 9, SAMPLED)
        late = client.start_round(round_of(sequence(key, 10, count=2)))
        assert client.collect(late, 0.05) == []
        time.sleep(0.5)
        assert client.collect(late, 0.05) == []
        assert client.stats.num_late == 1
        delay_s[0] = 0.0
        (result,) = client.collect(client.start_round(round_of(sequence(key, 11, count=2))), 5.0)
        assert result.committed_length == 11


# --------------------------------------------------------------------- a process of its own


def serve_forever(port_path: str) -> None:
    """A drafter in a process of its own, to be killed."""

    async def serve() -> None:
        server = DrafterServer(
            make_engine(make_drafter()), drafter_id="d0", digests=DIGESTS, config=DrafterConfig()
        )
        port = await server.start("127.0.0.1")
        with open(f"{port_path}.new", "w") as file:
            file.write(str(port))
        os.rename(f"{port_path}.new", port_path)
        await asyncio.Event().wait()

    torch.set_num_threads(1)
    asyncio.run(serve())


@pytest.fixture
def drafter_process(tmp_path) -> Iterator[tuple[subprocess.Popen, str]]:
    path = tmp_path / "port"
    code = f"from tests.test_drafter_rpc import serve_forever; serve_forever({str(path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        assert wait_for(path.exists, 60)
        yield process, f"127.0.0.1:{path.read_text()}"
    finally:
        process.kill()
        process.wait()


def test_a_stopped_then_killed_drafter(drafter_process):
    process, address = drafter_process
    with client_of(address) as client:
        assert client.wait_until_ready(20)
        key = open_with(client, "r", 9)
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10))), 5.0)
        assert result.outcome is DraftOutcome.DRAFTED
        # Stopped in the middle of a round, then killed: whoever waits is told at once.
        process.send_signal(signal.SIGSTOP)
        handle = client.start_round(round_of(sequence(key, 11, features=features(1))))
        killer = threading.Timer(0.2, process.kill)
        killer.start()
        started = time.monotonic()
        assert client.collect(handle, 10.0) == []
        assert time.monotonic() - started < 1.0
        killer.join()
        assert wait_for(lambda: state_of(client) == "lost", 2)
        assert "UNAVAILABLE" in client.status()[0].reason
        assert not client.has_session(key)
        assert client.block_size == 0
        assert client.stats.num_lost == 1


# ----------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64]
)
def test_tensors_keep_their_bits(dtype):
    for shape in ((3, 5), (0, 4), ()):
        tensor = (torch.randn(shape) * 100).to(dtype)
        decoded = decode_tensor(
            encode_tensor(tensor), name="x", dtypes=(dtype,), shape=tuple(shape)
        )
        assert decoded.dtype == dtype
        assert torch.equal(decoded, tensor)


@pytest.mark.parametrize(
    "message",
    [
        tensor_of([2, 2], b"1234"),
        tensor_of([-2, -2], b"\0" * 16),
        tensor_of([2**40, 2**40], b"\0" * 16),
        tensor_of([4], b"\0" * 16),
        tensor_of([2, 2], b"\0" * 16, 0),
        tensor_of([2, 2], b"\0" * 16, 99),
    ],
)
def test_tensors_that_lie_are_refused(message):
    with pytest.raises(InvalidRequestError, match="x: "):
        decode_tensor(message, name="x", dtypes=(torch.float32,), shape=(None, None))
