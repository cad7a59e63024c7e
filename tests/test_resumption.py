"""Clients whose router ends in the middle of a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from cluster.errors import (
    ClusterStateError,
    ConfigError,
    DeadlineExceededError,
    DsparkError,
    QueueFullError,
    ReplicaLostError,
    RouterStoppingError,
)
from cluster.request import SamplingParams, SpeculationParams
from cluster.rpc.client import AsyncClient, Chunk, Client
from cluster.rpc.convert import GenerateCall
from cluster.rpc.resumption import ROUTER_HEADER, Resumption
from cluster.rpc.router import RouterServer
from cluster.rpc.status import to_status
from cluster.v1 import common_pb2, inference_pb2
from tests.raw_chunks import refused_chunks
from tests.router_process import RouterProcess
from tests.rpc_tools import (
    MAX_MODEL_LEN,
    TOKENIZER,
    VOCAB_SIZE,
    Cluster,
    expected,
    gather_chunks,
    running_cluster,
    until,
)


@asynccontextmanager
async def second_router(cluster: Cluster, port: int = 0) -> AsyncIterator[tuple[RouterServer, str]]:
    """Another router of the same replicas, and its address."""
    router = RouterServer(
        tokenizer=TOKENIZER, model_name="fake", vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN
    )
    address = f"127.0.0.1:{await router.start('127.0.0.1', port)}"
    router.set_replicas([(replica.replica_id, replica.address) for replica in cluster.replicas])
    await until(lambda: router.is_ready)
    try:
        yield router, address
    finally:
        await router.stop()


def assert_unbroken(chunks: list[Chunk], prompt: list[int], max_tokens: int) -> None:
    tokens: list[int] = []
    for chunk in chunks:
        tokens += chunk.token_ids
    assert tokens == expected(prompt, max_tokens)
    assert chunks[-1].finish_reason is not None
    attempts = [chunk.attempt for chunk in chunks]
    assert attempts == sorted(attempts)


@pytest.mark.usefixtures("whole_streams")
@pytest.mark.parametrize("same_port", [True, False], ids=["one port", "two ports"])
async def test_streams_go_on_when_their_router_is_killed(same_port: bool) -> None:
    async with running_cluster(2, step_s=0.01) as cluster:
        here = int(cluster.address.rpartition(":")[2])
        async with RouterProcess(cluster.replicas, here if same_port else 0) as router:
            address = f"127.0.0.1:{router.port}"
            if not same_port:
                address += f",{cluster.address}"
            async with await connected_to(router, address) as client:
                await seen_routers(client, 1 if same_port else 2)
                prompts = [[number] for number in range(8)]
                tasks = [
                    asyncio.create_task(gather_chunks(client, prompt, max_tokens=300))
                    for prompt in prompts
                ]
                await until(lambda: sum(r.loop.num_active for r in cluster.replicas) == 8)
                num_elsewhere = cluster.router.num_active_requests
                await asyncio.sleep(0.3)
                router.kill()
                for prompt, task in zip(prompts, tasks, strict=True):
                    assert_unbroken(await task, prompt, 300)
        submitted = [request for r in cluster.replicas for request in r.loop.submitted]
        resumed = [request for request in submitted if request.resume_token_ids]
        assert all(request.attempt > 0 for request in resumed)
        assert len(resumed) == 8 - num_elsewhere > 0
        assert len(submitted) == 8 + len(resumed)


async def connected_to(router: RouterProcess, address: str) -> AsyncClient:
    """A client whose connection the router has, where several share the port."""
    while True:
        client = AsyncClient(address)
        if router.router_id in await seen_routers(client, 1):
            return client
        await client.close()


async def seen_routers(client: AsyncClient, count: int) -> set[str]:
    """Which routers answer, once they are so many."""
    seen: set[str] = set()
    async with asyncio.timeout(20):
        while len(seen) < count:
            seen.add((await client.status()).router_id)
    return seen


@pytest.mark.usefixtures("whole_streams")
async def test_the_only_router_is_killed_and_comes_back() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        async with RouterProcess(cluster.replicas) as first:
            client = Client(f"127.0.0.1:{first.port}")
            task = asyncio.create_task(asyncio.to_thread(read_all, client, [5], 300))
            await until(lambda: cluster.replicas[0].loop.num_active == 1)
            await asyncio.sleep(0.3)
        await until(lambda: cluster.replicas[0].loop.num_active == 0)
        async with second_router(cluster, first.port):
            assert_unbroken(await task, [5], 300)
        client.close()
        before, after = cluster.replicas[0].loop.submitted
        assert before.attempt == 0
        assert after.attempt > 0
        assert len(after.resume_token_ids) > 10


def read_all(client: Client, prompt: list[int], max_tokens: int) -> list[Chunk]:
    return list(client.generate(prompt, max_tokens=max_tokens))


@pytest.mark.usefixtures("whole_streams")
async def test_streams_that_outlast_the_drain_go_on_elsewhere() -> None:
    async with running_cluster(step_s=0.01) as cluster, second_router(cluster) as (_, other):
        async with AsyncClient(f"{cluster.address},{other}") as client:
            await seen_routers(client, 2)
            tasks = [
                asyncio.create_task(gather_chunks(client, [number], max_tokens=150))
                for number in range(6)
            ]
            await until(lambda: cluster.replicas[0].loop.num_active == 6)
            await asyncio.sleep(0.2)
            here = cluster.router.num_active_requests
            assert 0 < here < 6
            started = time.monotonic()
            await cluster.router.stop(0.3)
            assert time.monotonic() - started < 1.2
            late = asyncio.create_task(gather_chunks(client, [9], max_tokens=5))
            for number, task in enumerate(tasks):
                assert_unbroken(await task, [number], 150)
            assert_unbroken(await late, [9], 5)
        resumed = [r for r in cluster.replicas[0].loop.submitted if r.resume_token_ids]
        assert len(resumed) == here


async def test_what_outlasts_the_drain_is_told_so() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        client = AsyncClient(cluster.address, resume_timeout_s=0.0)
        async with client:
            got: list[int] = []

            async def read() -> None:
                async for chunk in client.generate([1], n=2, max_tokens=400):
                    got.extend(chunk.token_ids)

            task = asyncio.create_task(read())
            over_http = cluster.router.generate(
                generate_call(sampling=SamplingParams(max_tokens=400))
            )
            assert (await anext(over_http)).token_offset == 0
            await until(lambda: len(got) > 10)
            stopping = asyncio.create_task(cluster.router.stop(0.2))
            with pytest.raises(RouterStoppingError, match="being stopped"):
                await task
            with pytest.raises(RouterStoppingError):
                async for _ in over_http:
                    pass
            await asyncio.gather(stopping, cluster.router.stop(9.0))
            assert cluster.router.num_active_requests == 0


async def test_nothing_is_taken_up_without_a_router() -> None:
    async with running_cluster(step_s=0.01) as cluster, RouterProcess(cluster.replicas) as router:
        client = AsyncClient(f"127.0.0.1:{router.port}", resume_timeout_s=0.5)
        async with client:
            stream = client.generate([1], max_tokens=400)
            await anext(stream)
            router.kill()
            started = time.monotonic()
            with pytest.raises(ReplicaLostError):
                async for _ in stream:
                    pass
            assert 0.4 < time.monotonic() - started < 5.0
            started = time.monotonic()
            with pytest.raises(ClusterStateError, match="no cluster answers"):
                await gather_chunks(client, [1])
            assert time.monotonic() - started < 2.0
            with pytest.raises(DeadlineExceededError):
                await gather_chunks(client, [1], timeout_s=0.1)


class Broken(grpc.RpcError):
    def __init__(
        self,
        code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE,
        details: str = "Socket closed",
        trailing_metadata: Any = (),
    ) -> None:
        self.code = lambda: code
        self.details = lambda: details
        self.trailing_metadata = lambda: trailing_metadata


def generate_call(**fields: Any) -> GenerateCall:
    defaults: dict[str, Any] = {
        "request_id": "",
        "prompt": (1,),
        "sampling": SamplingParams(),
        "speculation": SpeculationParams(),
        "num_choices": 1,
        "resume_token_ids": (),
        "attempt": 0,
    }
    return GenerateCall(**{**defaults, **fields})


def resumption(timeout_s: float | None = None, **fields: Any) -> Resumption:
    call = generate_call(**fields)
    return Resumption(call, "here:1", timeout_s=timeout_s, resume_timeout_s=60.0)


def chunk(offset: int, *token_ids: int, finish: int = 0) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        token_offset=offset,
        token_ids=token_ids,
        token_sources=[common_pb2.TOKEN_SOURCE_TARGET] * len(token_ids),
        finish_reason=finish,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_chunks_that_repeat_or_skip_are_not_taken(offset: int) -> None:
    call = resumption()
    assert call.request().attempt == 0
    with refused_chunks() as refused:
        assert call.take(chunk(0, 5, 6)) is not None
        assert not refused
        assert call.take(chunk(offset, 7)) is None
        assert len(refused) == 1
    assert call.next_delay_s() > 0
    again = call.request()
    assert list(again.resume_token_ids.ids) == [5, 6]
    assert (again.attempt, again.request_id) == (1, call.request().request_id)
    assert call.take(chunk(2, 7, finish=common_pb2.FINISH_REASON_STOP)) is not None
    assert call.is_complete


def test_what_was_resumed_before_counts() -> None:
    call = resumption(resume_token_ids=(3, 4), attempt=6, request_id="mine")
    assert call.take(chunk(2, 5)) is not None
    call.failed(Broken(), ())
    call.next_delay_s()
    again = call.request()
    assert (list(again.resume_token_ids.ids), again.attempt) == ([3, 4, 5], 7)
    assert again.request_id == "mine"


def test_the_prompts_logprobs_come_once() -> None:
    call = resumption(sampling=SamplingParams(prompt_logprobs=1))

    def with_logprobs(offset: int) -> inference_pb2.GenerateResponse:
        message = chunk(offset, 5)
        message.prompt_logprobs.add().chosen.token_id = 1
        return message

    call.failed(Broken(), ())
    call.next_delay_s()
    assert call.request().sampling.prompt_logprobs == 1  # they are missing still
    first = call.take(with_logprobs(0))
    assert first is not None
    assert len(first.prompt_logprobs) == 1
    call.failed(Broken(), ())
    call.next_delay_s()
    assert not call.request().sampling.HasField("prompt_logprobs")
    second = call.take(with_logprobs(1))
    assert second is not None
    assert not second.prompt_logprobs


def test_several_choices_begin_anew_only_before_they_have_begun() -> None:
    call = resumption(num_choices=2)
    call.failed(Broken(), ((ROUTER_HEADER, "r"),))
    assert call.next_delay_s() > 0
    assert call.take(chunk(0, 1)) is not None
    assert call.take(chunk(0, 2)) is not None
    call.failed(Broken(), ())
    with pytest.raises(ReplicaLostError):
        call.next_delay_s()


def test_delays_grow_and_start_anew_with_a_token() -> None:
    call = resumption()
    call.take(chunk(0, 1))

    def next_delays(count: int) -> list[float]:
        delays = []
        for _ in range(count):
            call.failed(Broken(), ())
            delays.append(call.next_delay_s())
        return delays

    delays = next_delays(8)
    assert all(
        low * 0.5 <= delay <= low * 1.5
        for low, delay in zip([0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1], delays, strict=True)
    )
    call.take(chunk(1, 2))
    assert next_delays(1)[0] <= 0.075


def test_errors_of_the_cluster_are_final() -> None:
    call = resumption()
    call.take(chunk(0, 1))
    with pytest.raises(DsparkError, match="FAILED_PRECONDITION"):
        call.failed(Broken(grpc.StatusCode.FAILED_PRECONDITION), ())


def test_a_full_queue_ends_a_call_only_at_its_beginning() -> None:
    call = resumption()
    with pytest.raises(QueueFullError):
        call.failed(refusal(), ())
    call.take(chunk(0, 1))
    call.failed(Broken(), ())
    call.next_delay_s()
    call.failed(refusal(), ())
    assert call.next_delay_s() > 0


def refusal() -> Broken:
    return ended_with(QueueFullError("full", 0.5))


def ended_with(error: Exception) -> Broken:
    status = rpc_status.to_status(to_status(error))
    return Broken(status.code, status.details, status.trailing_metadata)


def test_routers_that_stop_in_turn_cost_a_queued_call_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    call = resumption()
    for _ in range(5):
        call.failed(ended_with(RouterStoppingError("stops")), ((ROUTER_HEADER, "r"),))
        assert call.next_delay_s() <= 0.075
        now += 50.0
    call.failed(ended_with(RouterStoppingError("stops")), ())  # before it took the call
    call.next_delay_s()
    now += 61.0
    call.failed(ended_with(RouterStoppingError("stops")), ())
    with pytest.raises(RouterStoppingError):
        call.next_delay_s()


@pytest.mark.parametrize("has_deadline", [True, False])
def test_a_call_that_was_taken_waits_for_a_place_until_its_deadline(
    has_deadline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    call = resumption(timeout_s=300.0 if has_deadline else None)
    call.failed(Broken(), ((ROUTER_HEADER, "r"),))
    call.next_delay_s()
    now += 200.0
    call.failed(refusal(), ())
    if has_deadline:
        assert call.next_delay_s() > 0
        now += 101.0
        with pytest.raises(DeadlineExceededError):
            call.timeout_s()
    else:
        with pytest.raises(ReplicaLostError):
            call.next_delay_s()


def test_several_addresses_must_be_known() -> None:
    with pytest.raises(ConfigError, match=r"'no-such-host\.invalid:1'"):
        Client("127.0.0.1:1,no-such-host.invalid:1")
    with pytest.raises(ConfigError, match=r"'127\.0\.0\.1'"):
        Client("127.0.0.1:1,127.0.0.1")
