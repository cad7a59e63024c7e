"""What a client gets: client, router and replica over real gRPC; only the engine is a fake."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from grpc import ChannelConnectivity, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.engine.load import PrefixCacheStats
from cluster.engine.text import TextStream
from cluster.errors import (
    ClusterStateError,
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
)
from cluster.request import (
    FinishReason,
    SamplingParams,
    SpeculationMode,
    SpeculationParams,
    TokenSource,
)
from cluster.rpc.client import AsyncClient, Client
from cluster.rpc.cluster_status import ShardStatus
from cluster.rpc.credentials import Credentials
from cluster.rpc.router import RouterServer
from cluster.rpc.status import from_rpc_error
from cluster.security.authenticator import Authenticator
from cluster.v1 import inference_pb2, inference_pb2_grpc
from tests.rpc_tools import (
    MAX_MODEL_LEN,
    TOKENIZER,
    VOCAB_SIZE,
    expected,
    gather_chunks,
    running_cluster,
    until,
)
from tests.test_security import entry, write_keys


async def test_stream_is_ordered_and_complete() -> None:
    async with running_cluster(tokens_per_step=3) as cluster:
        chunks = await gather_chunks(
            cluster.client, [1, 2, 3], max_tokens=50, logprobs=2, request_id="mine", attempt=4
        )
    tokens: list[int] = []
    for chunk in chunks:
        assert (chunk.request_id, chunk.choice_index, chunk.attempt) == ("mine", 0, 4)
        assert chunk.offset == len(tokens)
        assert len(chunk.token_sources) == len(chunk.logprobs) == len(chunk.token_ids)
        tokens += chunk.token_ids
    assert tokens == expected([1, 2, 3], 50)
    assert "".join(chunk.text for chunk in chunks) == TOKENIZER.decode(
        tokens, skip_special_tokens=True
    )
    assert chunks[0].token_sources[0] is TokenSource.ACCEPTED
    assert chunks[0].logprobs[0].chosen.logprob == -0.5
    assert len(chunks[0].logprobs[0].top) == 2
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 50)
    assert chunks[-1].usage.speculation.num_accepted_tokens_per_pos == [1]


async def test_everything_asked_for_reaches_the_engine() -> None:
    sampling = SamplingParams(
        temperature=0.5,
        top_k=5,
        top_p=0.75,
        min_p=0.25,
        seed=-(2**63),
        stop_token_ids=(7, 8),
        stop=("never",),
        max_tokens=9,
        min_tokens=2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={3: 1.5, 4: -100.0},
        ignore_eos=True,
        logprobs=0,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        allowed_token_ids=(5, 6),
        bad_words=("never",),
    )
    speculation = SpeculationParams(mode=SpeculationMode.OFF, num_speculative_tokens=0)
    async with running_cluster() as cluster:
        await cluster.client.complete(
            "hello", sampling=sampling, speculation=speculation, timeout_s=60
        )
        (request,) = cluster.replicas[0].loop.submitted
        assert request.sampling == sampling
        assert request.speculation == speculation
        assert list(request.prompt_token_ids) == TOKENIZER.encode("hello")
        assert request.deadline is not None
        assert 55 < request.deadline - time.monotonic() < 61  # gRPC rounds up
        # Nothing given: the server's defaults, and what the context leaves.
        await cluster.client.complete([1] * 500)
        request = cluster.replicas[0].loop.submitted[-1]
        assert request.sampling == SamplingParams(max_tokens=12)
        assert request.speculation == SpeculationParams()
        assert request.deadline is None
        stub = inference_pb2_grpc.InferenceServiceStub(cluster.client._channel)
        bare = inference_pb2.GenerateRequest(text="hello")
        assert [message async for message in stub.Generate(bare)]
        assert cluster.replicas[0].loop.submitted[-1].sampling == SamplingParams()


async def test_choices_of_one_request() -> None:
    async with running_cluster(2, tokens_per_step=2) as cluster:
        completions = await cluster.client.complete([5], n=16, max_tokens=20)
        assert [c.choice_index for c in completions] == list(range(16))
        for c in completions:
            assert list(c.token_ids) == expected([5], 20, c.choice_index)
        # They went to both replicas.
        assert all(len(replica.loop.submitted) == 8 for replica in cluster.replicas)


async def test_stop_strings_cut_alike_in_engine_and_router() -> None:
    text = "x = '好の🎉' # END of it"
    ids = TOKENIZER.encode(text)
    async with running_cluster(
        completion=lambda request: ids, tokens_per_step=4, tokenizer=TOKENIZER
    ) as cluster:
        for stop, cut in [("🎉'", "x = '好の"), ("D o", "x = '好の🎉' # EN"), ("zzz", text)]:
            chunks = await gather_chunks(cluster.client, [1], stop=["never", stop])
            assert "".join(chunk.text for chunk in chunks) == cut
            assert not any("\ufffd" in chunk.text for chunk in chunks)
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            assert stop not in TOKENIZER.decode(tokens[:-1])
            found = stop in text
            assert chunks[-1].finish_reason is (FinishReason.STOP if found else FinishReason.LENGTH)
            assert (stop in TOKENIZER.decode(tokens)) == found
        # Resumed at any token: the same tokens and the same text behind the client's.
        whole = await gather_chunks(cluster.client, [1], stop=["🎉'"])
        tokens = [token for chunk in whole for token in chunk.token_ids]
        for num_resumed in range(1, len(tokens), 5):
            client_text = "".join(
                delta.text for delta in map(_pushed(["🎉'"]), tokens[:num_resumed])
            )
            rest = await gather_chunks(
                cluster.client, [1], stop=["🎉'"], resume_token_ids=tokens[:num_resumed]
            )
            assert rest[0].offset == num_resumed
            assert [t for chunk in rest for t in chunk.token_ids] == tokens[num_resumed:]
            assert client_text + "".join(chunk.text for chunk in rest) == "x = '好の"
        with pytest.raises(InvalidRequestError, match="resume_token_ids"):
            await gather_chunks(cluster.client, [1], stop=["🎉'"], resume_token_ids=tokens)


def _pushed(stop: list[str]) -> Any:
    return TextStream(TOKENIZER, stop).push


async def test_many_streams_at_once() -> None:
    async with running_cluster(2, step_s=0.01, tokens_per_step=4) as cluster:
        tasks = [
            asyncio.create_task(gather_chunks(cluster.client, [number], max_tokens=40))
            for number in range(200)
        ]
        for number, task in enumerate(tasks):
            assert [t for chunk in await task for t in chunk.token_ids] == expected([number], 40)
        counts = [len(replica.loop.submitted) for replica in cluster.replicas]
        assert sum(counts) == 200
        assert min(counts) > 80


async def test_slow_client_gets_everything_in_bounded_memory() -> None:
    async with running_cluster(step_s=0.0, tokens_per_step=1) as cluster:
        tokens: list[int] = []
        num_chunks = 0
        # Log-probabilities make the stream outgrow what gRPC buffers by itself.
        async for chunk in cluster.client.generate([1], max_tokens=500, logprobs=20):
            assert chunk.offset == len(tokens)
            tokens += chunk.token_ids
            num_chunks += 1
            if num_chunks < 10:
                await asyncio.sleep(0.05)
        assert tokens == expected([1], 500)


async def test_retry_takes_over_its_request() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        old = asyncio.create_task(
            gather_chunks(cluster.client, [1], max_tokens=100, request_id="r", attempt=0)
        )
        await until(lambda: cluster.replicas[0].loop.num_active == 1)
        with pytest.raises(InvalidRequestError) as caught:
            await gather_chunks(cluster.client, [1], request_id="r")
        assert caught.value.field == "request_id"
        resumed = expected([1], 100)[:3]
        chunks = await gather_chunks(
            cluster.client,
            [1],
            max_tokens=100,
            request_id="r",
            attempt=1,
            resume_token_ids=resumed,
        )
        assert [t for chunk in chunks for t in chunk.token_ids] == expected([1], 100)[3:]
        assert {chunk.attempt for chunk in chunks} == {1}
        with pytest.raises(RequestCancelledError):
            await old


async def test_nobody_s_request_id_is_another_one_s(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", entry("alice", "a"), entry("bob", "b"))
    router = {"authenticator": Authenticator(keys)}
    async with running_cluster(step_s=0.01, router=router, key="a") as cluster:
        stream = asyncio.create_task(gather_chunks(cluster.client, [1], request_id="job"))
        await until(lambda: cluster.replicas[0].loop.num_active == 1)
        bob = AsyncClient(cluster.address, credentials=Credentials("b"))
        for attempt in (0, 9):
            [other] = await bob.complete([2], max_tokens=2, request_id="job", attempt=attempt)
            assert list(other.token_ids) == expected([2], 2)
        await bob.close()
        assert not stream.done()
        chunks = await stream
        assert [t for chunk in chunks for t in chunk.token_ids] == expected([1], 256)


async def test_tokens_are_held_to_the_key_s_rate(tmp_path: Path) -> None:
    limits = {"requests_per_second": 0.001}
    keys = write_keys(tmp_path / "keys.yaml", entry("a", "a", **limits), entry("b", "b", **limits))
    router = {"authenticator": Authenticator(keys)}
    async with (
        running_cluster(router=router, key="a") as cluster,
        aio.insecure_channel(cluster.address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        calls = (
            (stub.Tokenize, inference_pb2.TokenizeRequest(text="x"), "a"),
            (stub.Detokenize, inference_pb2.DetokenizeRequest(token_ids=[1]), "b"),
        )
        for method, request, key in calls:
            metadata = (("authorization", f"Bearer {key}"),)
            await method(request, metadata=metadata)
            with pytest.raises(aio.AioRpcError) as caught:
                await method(request, metadata=metadata)
            assert isinstance(from_rpc_error(caught.value), QueueFullError)


async def test_status() -> None:
    async with running_cluster(2) as cluster:
        await cluster.client.complete([1], max_tokens=30)
        async with asyncio.timeout(60):
            while True:
                status = await cluster.client.status()
                if sum(replica.num_output_tokens for replica in status.replicas) == 30:
                    break
                await asyncio.sleep(0.05)
        assert status.model == "fake"
        assert status.router_id == cluster.router.router_id
        assert status.num_active_requests == 0
        assert [r.replica_id for r in status.replicas] == ["replica-0", "replica-1"]
        assert [r.address for r in status.replicas] == [r.address for r in cluster.replicas]
        for replica in status.replicas:
            assert replica.state == "ready"
            assert (replica.speculation_state, replica.speculation_reason) == ("on", "scripted")
            assert replica.shards == (ShardStatus(rank=0, node="here", pid=1),)
            assert replica.drafters[0].round_trip_ms == 1.5
            assert replica.speculation.num_accepted_tokens_per_pos == [2, 1]
            assert replica.speculation.num_malformed_proposals == 7
            assert (replica.calibration_error, replica.calibration_drift) == (0.03, 1.25)
            assert replica.prefix_cache == PrefixCacheStats(100, 60, 7, 2)


async def test_blocking_client() -> None:
    async with running_cluster(step_s=0.005) as cluster:

        def use() -> None:
            with Client(cluster.address) as client:
                (completion,) = client.complete(
                    [4], max_tokens=20, temperature=0, speculation=False
                )
                assert list(completion.token_ids) == expected([4], 20)
                assert completion.finish_reason is FinishReason.LENGTH
                client.complete([4], max_tokens=1, stop="END")
                with pytest.raises(InvalidRequestError) as caught:
                    client.complete([4], temperature=float("nan"))
                assert caught.value.field == "sampling.temperature"
                with pytest.raises(DeadlineExceededError):
                    client.complete([4], max_tokens=400, timeout_s=0.1)
                stream = client.generate([4], max_tokens=400)
                next(stream)
                stream.close()
                assert client.status().model == "fake"

        await asyncio.to_thread(use)
        loop = cluster.replicas[0].loop
        await until(lambda: len(loop.cancelled) == 2 and loop.num_active == 0)
        assert loop.submitted[0].speculation.is_off
        assert loop.submitted[1].sampling.stop == ("END",)

    def use_nothing() -> None:
        with Client(cluster.address) as client, pytest.raises(ClusterStateError):
            client.complete([1])

    await asyncio.to_thread(use_nothing)


async def test_health_and_reflection() -> None:
    async with running_cluster() as cluster:
        for address, service in [
            (cluster.address, "cluster.v1.InferenceService"),
            (cluster.replicas[0].address, "cluster.v1.ReplicaService"),
        ]:
            async with aio.insecure_channel(address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                for name in ("", service):
                    answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                call = stub.ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(list_services="")])
                )
                names = {s.name for s in (await call.read()).list_services_response.service}
                assert {service, "grpc.health.v1.Health"} <= names
                call.cancel()


async def test_a_router_serves_once_a_replica_has_been_ready() -> None:
    """And then until it is stopped: requests wait for a replica that starts anew."""
    serving = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    async with running_cluster(0) as cluster, aio.insecure_channel(cluster.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def statuses() -> set[int]:
            names = ("", "cluster.v1.InferenceService")
            requests = [health_pb2.HealthCheckRequest(service=name) for name in names]
            return {(await health.Check(request)).status for request in requests}

        assert await statuses() == {not_serving}
        assert not cluster.router.is_ready
        first = await cluster.add_replica()
        await cluster.wait_ready(1)
        assert await statuses() == {serving}
        await first.stop()
        await until(lambda: cluster.router.status().replicas[0].state != "ready")
        assert await statuses() == {serving}
        assert cluster.router.is_ready
        running = health.Watch(health_pb2.HealthCheckRequest())
        assert (await running.read()).status == serving
        # It waits for a replica, so that the router is not gone at once.
        waiting = asyncio.create_task(gather_chunks(cluster.client, [1], timeout_s=20.0))
        await until(lambda: cluster.router.num_active_requests == 1)
        stopping = asyncio.create_task(cluster.router.stop(grace_s=1.0))
        assert (await running.read()).status == not_serving
        assert not cluster.router.is_ready
        running.cancel()
        await stopping
        waiting.cancel()


async def test_routers_share_a_port() -> None:
    first, second = (
        RouterServer(
            tokenizer=TOKENIZER, model_name="m", vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN
        )
        for _ in range(2)
    )
    port = await first.start("127.0.0.1")
    assert await second.start("127.0.0.1", port) == port
    await first.stop()
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        assert (await client.status()).router_id == second.router_id
    await second.stop()


async def test_old_connections_end_when_their_streams_have() -> None:
    age = {"max_connection_age_s": 0.3, "max_connection_age_grace_s": 30.0}
    async with running_cluster(step_s=0.02, router=age) as cluster:
        async with aio.insecure_channel(cluster.address) as channel, asyncio.timeout(60):
            await channel.channel_ready()
            await channel.wait_for_state_change(ChannelConnectivity.READY)  # the server's wish
        # A stream of 2 s on such a connection reaches its end.
        chunks = await gather_chunks(cluster.client, [1, 2, 3], max_tokens=100)
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert tokens == expected([1, 2, 3], 100)


async def test_calls_take_turns_where_a_name_has_several_addresses() -> None:
    routers = [
        RouterServer(
            tokenizer=TOKENIZER,
            model_name="fake",
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
        )
        for _ in range(2)
    ]
    addresses = [f"127.0.0.1:{await router.start('127.0.0.1')}" for router in routers]
    async with AsyncClient(f"ipv4:{','.join(addresses)}") as client:
        async with asyncio.timeout(60):
            while len({(await client.status()).router_id for _ in range(4)}) < 2:
                await asyncio.sleep(0.01)  # the second connection may come later
        seen = [(await client.status()).router_id for _ in range(4)]
    assert sorted(seen) == sorted(2 * [router.router_id for router in routers])
    for router in routers:
        await router.stop()
