"""Clients that do not read, that open many connections, or whose headers are large."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import grpc
import pytest
from grpc import aio

from cluster.rpc.channels import channel_options
from cluster.rpc.client import AsyncClient
from cluster.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.rpc_tools import expected, gather_chunks, running_cluster, until

LOGPROBS = 20  # about 500 bytes a token: what a window holds is soon full


def wide_request(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[1]),
        sampling=common_pb2.SamplingParams(max_tokens=500, logprobs=LOGPROBS),
        **fields,
    )


async def read_all(call: Any) -> list[inference_pb2.GenerateResponse]:
    return [chunk async for chunk in call]


def narrow_channel(address: str) -> aio.Channel:
    """One that takes 64 KiB from the server and no more until somebody reads."""
    return aio.insecure_channel(address, options=[*channel_options(), ("grpc.http2.bdp_probe", 0)])


async def test_a_client_that_never_reads_holds_its_slots_for_the_bound_only() -> None:
    options = {"slow_reader_timeout_s": 0.5}
    # A choice's output is 250 kB a second, and there is no end of it within the test.
    async with (
        running_cluster(router=options, tokens_per_step=1, step_s=0.002) as cluster,
        narrow_channel(cluster.address) as channel,
    ):
        loop = cluster.replicas[0].loop
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = [stub.Generate(wide_request(n=8)) for _ in range(3)]
        await until(lambda: loop.num_active == 24)
        started = time.monotonic()
        # Somebody who reads is served meanwhile.
        chunks = await gather_chunks(cluster.client, [9], max_tokens=100)
        assert [t for chunk in chunks for t in chunk.token_ids] == expected([9], 100)
        await until(lambda: cluster.router.num_active_requests == 0)
        await until(lambda: loop.num_active == 0)
        assert time.monotonic() - started < 30.0
        assert cluster.router.num_queued_tokens == 0
        assert cluster.router.authenticator.refusals.counts["slow_reader"] == 3
        # Who reads at last gets what was sent, and then is told.
        codes = []
        for call in calls:
            with pytest.raises(aio.AioRpcError) as caught:
                await read_all(call)
            codes.append(caught.value.code())
        assert codes == [grpc.StatusCode.CANCELLED] * 3
        assert "read nothing for 0.5 s" in (caught.value.details() or "")


async def test_one_chunk_for_each_choice_is_all_that_is_held() -> None:
    """Whatever is generated while the client does not read arrives merged, each token once."""
    async with (
        running_cluster(tokens_per_step=1, step_s=0.001) as cluster,
        narrow_channel(cluster.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(wide_request(n=4))
        first = await anext(aiter(call))
        loop = cluster.replicas[0].loop
        await until(lambda: loop.num_active == 0)  # all is generated, little is sent
        await asyncio.sleep(0.1)
        (generation,) = cluster.router._active.values()
        assert all(choice._chunk is not None for choice in generation._choices)
        chunks = [first, *await read_all(call)]
        assert len(chunks) < 1500  # of 2,000 tokens: the rest came merged
        tokens: dict[int, list[int]] = {}
        for chunk in chunks:
            known = tokens.setdefault(chunk.choice_index, [])
            assert chunk.token_offset == len(known)
            known += chunk.token_ids
        assert {len(known) for known in tokens.values()} == {500}


async def test_large_headers_are_refused() -> None:
    async with (
        running_cluster(router={"max_metadata_bytes": 4096}) as cluster,
        aio.insecure_channel(cluster.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        asked = inference_pb2.GetStatusRequest()
        answer = await stub.GetStatus(asked, metadata=(("x-filler", "x" * 1000),))
        assert answer.model == "fake"
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.GetStatus(asked, metadata=(("x-filler", "x" * 20_000),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_connections_beyond_the_most_are_closed_and_cost_the_others_nothing() -> None:
    async with running_cluster(router={"max_connections": 4}, step_s=0.02) as cluster:
        await cluster.client.status()  # the fourth connection
        clients = [AsyncClient(cluster.address) for _ in range(3)]
        streams = [
            asyncio.create_task(gather_chunks(client, [number], max_tokens=200))
            for number, client in enumerate(clients, 1)
        ]
        await until(lambda: cluster.router.num_active_requests == 3)
        host, port = cluster.address.split(":")
        for _ in range(20):
            with socket.create_connection((host, int(port)), timeout=5) as surplus:
                assert await asyncio.to_thread(surplus.recv, 1) == b"", "it is not closed"
        async with aio.insecure_channel(cluster.address, options=channel_options()) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.GetStatus(inference_pb2.GetStatusRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            for number, chunks in enumerate(await asyncio.gather(*streams), 1):
                assert [t for chunk in chunks for t in chunk.token_ids] == expected([number], 200)
            await clients.pop().close()  # makes room
            status = inference_pb2.GetStatusRequest()
            answer = await stub.GetStatus(status, wait_for_ready=True, timeout=20)
            assert answer.model == "fake"
        for client in clients:
            await client.close()


async def test_calls_beyond_a_connections_streams_wait_or_are_refused() -> None:
    async with (
        running_cluster(router={"max_streams": 4}, step_s=0.02) as cluster,
        aio.insecure_channel(cluster.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[1]),
            sampling=common_pb2.SamplingParams(max_tokens=20),
        )
        warm = stub.Generate(request)  # the limit is known once the connection is
        async for _ in warm:
            pass
        calls = [stub.Generate(request) for _ in range(10)]

        async def finish(call: Any) -> int:
            return sum([len(chunk.token_ids) async for chunk in call])

        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, cluster.router.num_active_requests)
                await asyncio.sleep(0.002)

        watching = asyncio.create_task(watch())
        ends = await asyncio.gather(*map(finish, calls), return_exceptions=True)
        watching.cancel()
        assert most == 4
        assert ends.count(20) >= 4
        for end in ends:
            if end != 20:
                assert isinstance(end, aio.AioRpcError)
                assert end.code() is grpc.StatusCode.UNAVAILABLE
        assert await finish(stub.Generate(request)) == 20
