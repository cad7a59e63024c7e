"""A replica's server before routers that are none, alike, or slow."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc import aio

from cluster.rpc import replica_server
from cluster.rpc.channels import PROTOCOL_VERSION
from cluster.v1 import common_pb2, replica_pb2, replica_pb2_grpc
from tests.rpc_tools import MAX_MODEL_LEN, VOCAB_SIZE, expected, running_cluster, until


async def test_replica_refuses_what_is_no_router() -> None:
    async with (
        running_cluster() as cluster,
        aio.insecure_channel(cluster.replicas[0].address) as channel,
    ):
        stub = replica_pb2_grpc.ReplicaServiceStub(channel)
        hello = replica_pb2.ConnectRequest.Hello(protocol_version=PROTOCOL_VERSION + 1)
        for message in (
            replica_pb2.ConnectRequest(hello=hello),
            replica_pb2.ConnectRequest(cancel=replica_pb2.ConnectRequest.Cancel()),
        ):
            call = stub.Connect()
            await call.write(message)
            with pytest.raises(aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_who_says_no_hello_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_server, "HELLO_TIMEOUT_S", 0.2)
    async with (
        running_cluster() as cluster,
        aio.insecure_channel(cluster.replicas[0].address) as channel,
    ):
        call = replica_pb2_grpc.ReplicaServiceStub(channel).Connect()
        async with asyncio.timeout(20):
            with pytest.raises(aio.AioRpcError, match="hello: did not come within") as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_two_routers_may_choose_the_same_ids() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        replica = cluster.replicas[0]
        async with aio.insecure_channel(replica.address) as channel:
            stub = replica_pb2_grpc.ReplicaServiceStub(channel)
            calls = []
            for _ in range(2):
                call = stub.Connect()
                welcome = await say_hello(call)
                assert (welcome.max_model_len, welcome.vocab_size) == (MAX_MODEL_LEN, VOCAB_SIZE)
                submit = replica_pb2.ConnectRequest.Submit(request_id="same", prompt_token_ids=[1])
                await call.write(replica_pb2.ConnectRequest(submit=submit))
                calls.append(call)
            await until(lambda: replica.loop.num_active == 2)
            calls[0].cancel()
            await until(lambda: replica.loop.num_active == 1)
            # A load report comes within a second, and the other stream goes on.
            steps = [(await calls[1].read()).step for _ in range(10)]
            assert any(step.deltas for step in steps)
            assert any(step.HasField("load") for step in steps)
            calls[1].cancel()
            await until(lambda: replica.loop.num_active == 0)
            assert len(replica.loop.cancelled) == 2


async def test_slow_router_is_not_waited_for() -> None:
    async with running_cluster(step_s=0.0) as cluster:
        replica = cluster.replicas[0]
        options = [("grpc.http2.bdp_probe", 0)]
        async with aio.insecure_channel(replica.address, options=options) as channel:
            call = replica_pb2_grpc.ReplicaServiceStub(channel).Connect()
            await say_hello(call)
            for number in range(4):
                await call.write(
                    replica_pb2.ConnectRequest(
                        submit=replica_pb2.ConnectRequest.Submit(
                            request_id=str(number),
                            prompt_token_ids=[number],
                            sampling=common_pb2.SamplingParams(max_tokens=500, logprobs=20),
                        )
                    )
                )
            # Nobody reads, and the engine comes to its end all the same.
            await until(lambda: len(replica.loop.submitted) == 4 and not replica.loop.num_active)
            tokens: dict[str, list[int]] = {str(number): [] for number in range(4)}
            num_deltas = num_finished = 0
            while num_finished < 4:
                for delta in (await call.read()).step.deltas:
                    assert delta.token_offset == len(tokens[delta.request_id])
                    assert len(delta.logprobs) == len(delta.token_ids)
                    tokens[delta.request_id] += delta.token_ids
                    num_deltas += 1
                    num_finished += delta.finish_reason != 0
            assert tokens == {str(number): expected([number], 500) for number in range(4)}
            assert num_deltas < 1500
            call.cancel()


async def say_hello(call: aio.StreamStreamCall) -> replica_pb2.ConnectResponse.Welcome:
    """Begins a router's stream."""
    hello = replica_pb2.ConnectRequest.Hello(protocol_version=PROTOCOL_VERSION)
    await call.write(replica_pb2.ConnectRequest(hello=hello))
    return (await call.read()).welcome
