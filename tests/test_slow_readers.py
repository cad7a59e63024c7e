"""Clients that do not read, that open many connections, or whose headers are large."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import time
from contextlib import suppress
from typing import Any

import grpc
import pytest
from grpc import aio

from cluster.rpc.channels import channel_options
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
        assert time.monotonic() - started < 5.0
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


# ------------------------------------------------------------------------------- many connections

NUM_CONNECTIONS = 2000
NUM_STREAMS = 200
_NUM_CLIENTS = 4


def _open_file_limit_missing() -> str | None:
    # Both ends of a connection, and what else a process has open.
    needed = NUM_CONNECTIONS + NUM_STREAMS + 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(hard, needed)))
            return None
        return f"ulimit -n is {soft}, {needed} are needed"
    return None


def _connect_many(address: str, num: int, results: Any) -> None:
    """A client process: opens connections, has one request on each, and reads them to the end."""

    async def one(index: int) -> tuple[int, list[int]]:
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with aio.insecure_channel(address, options=options) as channel:
            request = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=[index % 997]),
                sampling=common_pb2.SamplingParams(max_tokens=5),
            )
            call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
            return index, [token async for chunk in call for token in chunk.token_ids]

    async def all_of_them() -> list[tuple[int, list[int]]]:
        return list(await asyncio.gather(*(one(index) for index in range(num))))

    results.put(asyncio.run(all_of_them()))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_thousands_of_connections_and_hundreds_of_streams() -> None:
    if reason := _open_file_limit_missing():
        pytest.skip(reason)
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    released = False

    async with running_cluster(step_s=0.05, max_num_seqs=NUM_STREAMS + NUM_CONNECTIONS) as cluster:
        loop = cluster.replicas[0].loop
        # Those whose prompt is one token wait, as behind a full batch, until they are let go.
        loop.is_queued = lambda request: len(request.prompt_token_ids) == 1 and not released
        num_read = [0] * NUM_STREAMS

        async def read(index: int) -> None:
            while True:  # one after the other, so that there are as many all the time
                offset = 0
                async for chunk in cluster.client.generate([7, index], max_tokens=500):
                    assert chunk.offset == offset
                    offset += len(chunk.token_ids)
                    num_read[index] += len(chunk.token_ids)

        def num_queued() -> int:
            return sum(len(r.prompt_token_ids) == 1 for r in loop.submitted)

        readers = [asyncio.create_task(read(index)) for index in range(NUM_STREAMS)]
        await until(lambda: min(num_read) > 0, 60.0)
        clients = [
            context.Process(
                target=_connect_many,
                args=(cluster.address, NUM_CONNECTIONS // _NUM_CLIENTS, results),
            )
            for _ in range(_NUM_CLIENTS)
        ]
        for client in clients:
            client.start()
        try:
            await until(lambda: num_queued() == NUM_CONNECTIONS, 200.0)
            num_files = len(os.listdir("/proc/self/fd"))
            assert num_files > NUM_CONNECTIONS
            before = list(num_read)
            await until(
                lambda: all(now > then for now, then in zip(num_read, before, strict=True)), 60.0
            )
            assert cluster.router.num_active_requests > NUM_CONNECTIONS + NUM_STREAMS / 2
            started = time.monotonic()
            released = True
            answers = []
            for _ in clients:
                answers += await asyncio.to_thread(results.get, timeout=120)
            print(
                f"{len(answers)} queued requests were answered in "
                f"{time.monotonic() - started:.1f} s beside {NUM_STREAMS} streams"
            )
            assert len(answers) == NUM_CONNECTIONS
            for index, tokens in answers:
                assert tokens == expected([index % 997], 5)
        finally:
            for client in clients:
                await asyncio.to_thread(client.join, 10)
                client.kill()
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
        await until(lambda: cluster.router.num_active_requests == 0, 60.0)
        await until(lambda: len(os.listdir("/proc/self/fd")) < num_files - NUM_CONNECTIONS + 50, 30)
