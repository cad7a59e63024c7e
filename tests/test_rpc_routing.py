"""Where requests go, who waits and who is refused, over real gRPC; only the engine is a fake."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from cluster.errors import InvalidRequestError, QueueFullError
from cluster.request import Priority, Request
from cluster.routing.page_digests import page_digest
from cluster.routing.prefix_journal import PrefixJournal
from cluster.rpc.convert import generate_call_from_proto
from cluster.rpc.router import RouterServer
from cluster.v1 import inference_pb2, inference_pb2_grpc
from tests.rpc_tools import (
    MAX_MODEL_LEN,
    TOKENIZER,
    VOCAB_SIZE,
    Cluster,
    Replica,
    expected,
    gather_chunks,
    running_cluster,
    until,
)

PAGE_SIZE = 4


async def add_caching_replica(cluster: Cluster, **engine: Any) -> Replica:
    """A replica that reports the prompts that it was sent, as one that caches them does."""
    journal = PrefixJournal(num_pages=1000, page_size=PAGE_SIZE)

    def completion(request: Request) -> list[int]:
        parent = b""
        for index in range(len(request.prompt_token_ids) // PAGE_SIZE):
            page = request.prompt_token_ids[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
            parent = page_digest(parent, page)
            journal.add(index, parent)
        return [1] * request.sampling.max_tokens

    replica = await cluster.add_replica(completion=completion, journal=journal, **engine)
    await cluster.wait_ready(len(cluster.replicas))
    return replica


async def test_conversations_stay_where_their_prefix_is() -> None:
    async with running_cluster(0) as cluster:
        for _ in range(3):
            await add_caching_replica(cluster)
        system = [9] * 20
        turns = {number: [*system, *[number] * 120] for number in range(12)}
        homes: dict[int, set[int]] = {number: set() for number in turns}
        for _ in range(3):
            for number, prompt in turns.items():
                before = [len(replica.loop.submitted) for replica in cluster.replicas]
                await gather_chunks(cluster.client, prompt, max_tokens=2)
                after = [len(replica.loop.submitted) for replica in cluster.replicas]
                homes[number].add([a - b for a, b in zip(after, before, strict=True)].index(1))
                prompt += [1, 1, *[number] * 20]
        assert all(len(home) == 1 for home in homes.values())


async def test_a_router_that_connects_later_is_told_everything() -> None:
    async with running_cluster(0) as cluster:
        first = await add_caching_replica(cluster)
        await gather_chunks(cluster.client, [5] * 200, max_tokens=2)
        await add_caching_replica(cluster)
        router = RouterServer(
            tokenizer=TOKENIZER,
            model_name="fake",
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
        )
        await router.start("127.0.0.1")
        router.set_replicas([(r.replica_id, r.address) for r in cluster.replicas])
        try:
            await until(lambda: [s.num_routers for s in router._pool.statuses()] == [2, 2])
            message = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=[5] * 200 + [6] * 9)
            )
            message.sampling.max_tokens = 2
            key = router.authenticator.authenticate(None)
            before = len(first.loop.submitted)
            for _ in range(6):
                assert [
                    chunk
                    async for chunk in router.generate(generate_call_from_proto(message), None, key)
                ]
            assert len(first.loop.submitted) == before + 6
        finally:
            await router.stop()


async def test_a_full_replica_is_not_the_last_word() -> None:
    async with running_cluster(0) as cluster:
        full = await cluster.add_replica(max_num_seqs=0)
        await cluster.add_replica()
        await cluster.wait_ready(2)
        for number in range(20):
            chunks = await gather_chunks(cluster.client, [number], max_tokens=4)
            assert [t for c in chunks for t in c.token_ids] == expected([number], 4)
        assert full.loop.submitted


async def test_where_all_are_full_a_client_is_told_at_once() -> None:
    async with running_cluster(6, max_num_seqs=0) as cluster:
        started_at = time.monotonic()
        with pytest.raises(QueueFullError) as caught:
            await gather_chunks(cluster.client, [1])
        assert time.monotonic() - started_at < 2.0
        assert caught.value.retry_after_s >= 0.5
        asked = Counter(len(replica.loop.submitted) for replica in cluster.replicas)
        assert asked == {1: 3, 0: 3}


async def test_what_waits_on_a_replica_is_told_how_long_it_may() -> None:
    async with running_cluster(router={"queue_timeout_s": 7.0}, step_s=0.0) as cluster:
        sent_at = time.monotonic()
        await gather_chunks(cluster.client, [1], max_tokens=3, priority=Priority.BATCH)
        (request,) = cluster.replicas[0].loop.submitted
        assert request.priority is Priority.BATCH
        assert request.queue_deadline is not None
        assert 6.0 < request.queue_deadline - sent_at < 8.0


async def test_who_has_waited_long_enough_is_refused_and_not_sent_elsewhere() -> None:
    def error_at(request: Request, index: int) -> Exception | None:
        late = request.queue_deadline is not None and time.monotonic() >= request.queue_deadline
        return QueueFullError("the request waited too long", 1.0) if late else None

    router = {"queue_timeout_s": 0.2}
    async with running_cluster(2, router=router, step_s=0.3, error_at=error_at) as cluster:
        with pytest.raises(QueueFullError, match="waited too long") as caught:
            await gather_chunks(cluster.client, [1], max_tokens=3)
        assert caught.value.retry_after_s >= 1.0
        assert sum(len(replica.loop.submitted) for replica in cluster.replicas) == 1


async def test_a_stream_that_has_begun_has_no_queue_timeout_elsewhere() -> None:
    router = {"queue_timeout_s": 30.0}
    async with running_cluster(router=router, step_s=0.02) as cluster:
        task = asyncio.create_task(gather_chunks(cluster.client, [3], max_tokens=60))
        await until(lambda: 0 < cluster.router.num_queued_tokens < 55)
        await cluster.add_replica()
        await cluster.wait_ready(2)
        await cluster.replicas[0].stop()
        assert [t for c in await task for t in c.token_ids] == expected([3], 60)
        (resumed,) = cluster.replicas[1].loop.submitted
        assert resumed.resume_token_ids
        assert resumed.queue_deadline is None


async def test_what_waits_for_a_replica_is_placed_in_the_order_of_turns() -> None:
    async with running_cluster(0) as cluster:
        tasks = []
        for number, priority in enumerate((Priority.BATCH, Priority.DEFAULT, Priority.INTERACTIVE)):
            call = gather_chunks(cluster.client, [number], max_tokens=2, priority=priority)
            tasks.append(asyncio.create_task(call))
            await until(lambda number=number: cluster.router.num_active_requests == number + 1)
        replica = await cluster.add_replica()
        for task in tasks:
            await task
        assert [r.prompt_token_ids[0] for r in replica.loop.submitted] == [2, 1, 0]


async def test_an_unknown_priority_is_bad_input() -> None:
    async with running_cluster() as cluster:
        stub = inference_pb2_grpc.InferenceServiceStub(cluster.client._channel)
        message = inference_pb2.GenerateRequest(text="x", priority=9)  # type: ignore[arg-type]
        with pytest.raises(Exception, match="priority: unknown value 9"):
            await stub.Generate(message).read()
        with pytest.raises(InvalidRequestError) as caught:
            await gather_chunks(cluster.client, [1], priority="high")
        assert caught.value.field == "priority"


async def test_several_routers_spread_what_each_of_them_is_sent() -> None:
    """Each has an own view, and none is told of another."""
    async with running_cluster(4, step_s=0.02) as cluster:
        routers = []
        for _ in range(2):
            router = RouterServer(
                tokenizer=TOKENIZER,
                model_name="fake",
                vocab_size=VOCAB_SIZE,
                max_model_len=MAX_MODEL_LEN,
            )
            await router.start("127.0.0.1")
            router.set_replicas([(r.replica_id, r.address) for r in cluster.replicas])
            routers.append(router)
        try:
            for router in routers:
                await until(
                    lambda router=router: (
                        [s.num_routers for s in router._pool.statuses()] == [3] * 4
                    )
                )

            async def ask(router: RouterServer, number: int) -> None:
                message = inference_pb2.GenerateRequest(
                    token_ids=inference_pb2.TokenIds(ids=[number] * 8)
                )
                message.sampling.max_tokens = 20
                key = router.authenticator.authenticate(None)
                assert [
                    chunk
                    async for chunk in router.generate(generate_call_from_proto(message), None, key)
                ]

            await asyncio.gather(*(ask(routers[n % 2], n) for n in range(80)))
            counts = [len(replica.loop.submitted) for replica in cluster.replicas]
            assert sum(counts) == 80
            assert max(counts) <= 32  # 20 each would be even
        finally:
            for router in routers:
                await router.stop()
