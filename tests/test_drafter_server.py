"""A drafter's server and replicas that break the protocol."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from cluster.engine.draft_client import DraftOutcome
from cluster.engine.draft_engine import DraftEngine
from cluster.rpc.channels import PROTOCOL_VERSION
from cluster.rpc.draft_messages import encode_digests
from cluster.rpc.drafter_status import drafter_holdings
from cluster.rpc.tensors import encode_tensor
from cluster.v1 import drafter_pb2, drafter_pb2_grpc
from tests.draft_helpers import BLOCK, VOCAB, D, make_drafter, make_engine, round_of, sequence
from tests.drafter_rpc_tools import (
    DIGESTS,
    LoopThread,
    client_of,
    open_with,
    served,
    tensor_of,
    wait_for,
)


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


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
        "new_token_ids": [1, 1, 1],
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
        "token_ids": [1, 1, 1],
        "sampling": drafter_pb2.FeedRequest.DraftSampling(temperature=1.0, top_p=1.0),
    }
    return drafter_pb2.FeedRequest(chunk=drafter_pb2.FeedRequest.Chunk(**{**values, **changes}))


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
    "tokens": ([hello_request(), a_round(new_token_ids=[1, 1, VOCAB])], "sequence.new_token_ids"),
    "no anchor": ([hello_request(), a_round(new_token_ids=[])], "sequence.new_token_ids"),
    "too few": ([hello_request(), a_round(new_token_ids=[1, 1])], "sequence.new_token_ids"),
    "too many": ([hello_request(), a_round(new_token_ids=[1] * 4)], "sequence.new_token_ids"),
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
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9)
        with grpc.insecure_channel(address) as channel:
            stub = drafter_pb2_grpc.DrafterServiceStub(channel)
            for name, (messages, field) in BAD_DRAFTS.items():
                with pytest.raises(grpc.RpcError) as caught:
                    list(stub.Draft(iter(messages), timeout=60))
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
        "no tokens": ([a_chunk(token_ids=[])], "chunk.token_ids"),
        "too many tokens": ([a_chunk(token_ids=[1] * 514)], "chunk.token_ids"),
        "foreign token": ([a_chunk(token_ids=[1, 1, VOCAB])], "chunk.token_ids"),
        "rows": ([a_chunk(token_ids=[1, 1])], "chunk.features"),
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
                stop.wait(60)

            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Feed(requests(), timeout=60))
            stop.set()
            assert field_of(caught.value) == field, name


def test_more_than_the_credit_or_four_rounds_end_the_stream(loop):
    class SlowEngine(DraftEngine):
        def draft(self, rounds):
            time.sleep(0.3)
            return super().draft(rounds)

        def append_all(self, *args):
            time.sleep(0.3)
            return super().append_all(*args)

    base = make_engine(make_drafter())
    base.__class__ = SlowEngine
    with (
        served(loop, base, feed_credit_bytes=4 * D * 4) as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = drafter_pb2_grpc.DrafterServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Draft(iter([hello_request(), *[a_round()] * 8]), timeout=60))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        chunks = [a_chunk(start=2 * i, sampling=None) if i else a_chunk() for i in range(6)]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Feed(iter([feed_hello(), *chunks]), timeout=60))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_replica_that_comes_back_leaves_nothing_of_its_last_stream(loop):
    engine = make_engine(make_drafter())
    with (
        served(loop, engine, session_grace_s=60) as (server, address),
        client_of(address, replica_id="other") as other,
    ):
        assert wait_for(other.is_ready)
        kept = open_with(other, "r", 9)
        with client_of(address) as client:
            assert wait_for(client.is_ready)
            open_with(client, "r", 9)
        assert wait_for(lambda: server.num_streams == 1)
        assert engine.num_sessions == 2  # for the grace
        assert loop.run(drafter_holdings(address, timeout_s=30)) == (2, 1)
        with client_of(address) as client:
            assert wait_for(client.is_ready)
            key = open_with(client, "new", 9)
            assert engine.num_sessions == 2
            assert engine.length_of("replica", key) == 9
            assert engine.length_of("other", kept) == 9
            engine.check_integrity()


def test_a_failing_pass_ends_the_streams_it_hit_only(loop):
    class BrokenEngine(DraftEngine):
        def draft(self, rounds):
            if any(replica_id == "x" for replica_id, _ in rounds):
                raise RuntimeError("out of memory, say")
            return super().draft(rounds)

    engine = make_engine(make_drafter())
    engine.__class__ = BrokenEngine
    with served(loop, engine) as (_, address), client_of(address) as client:
        assert wait_for(client.is_ready)
        key = open_with(client, "r", 9)
        with grpc.insecure_channel(address) as channel:
            stub = drafter_pb2_grpc.DrafterServiceStub(channel)
            stop = threading.Event()

            def requests():
                yield hello_request()
                yield a_round()
                stop.wait(60)

            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Draft(requests(), timeout=60))
            stop.set()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
        (result,) = client.collect(client.start_round(round_of(sequence(key, 10))), 5.0)
        assert result.outcome is DraftOutcome.DRAFTED
