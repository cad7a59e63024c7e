"""Replicas that are lost, drained or faulty while they serve."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc import aio

from cluster.errors import (
    ClusterStateError,
    DeadlineExceededError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
)
from cluster.request import Request, SamplingParams
from cluster.rpc.channels import PROTOCOL_VERSION
from cluster.rpc.choice import Choice
from cluster.rpc.client import AsyncClient
from cluster.rpc.convert import generate_call_from_proto
from cluster.rpc.replica_pool import ReplicaPool
from cluster.v1 import common_pb2, inference_pb2, replica_pb2, replica_pb2_grpc
from tests.rpc_tools import (
    TOKENIZER,
    VOCAB_SIZE,
    collect,
    expected,
    gather_chunks,
    running_cluster,
    until,
)

pytestmark = pytest.mark.usefixtures("whole_streams")


@pytest.mark.parametrize("how", ["killed", "drained", "engine"])
async def test_stream_goes_on_when_its_replica_is_lost(how: str) -> None:
    def error_at(request: Request, index: int) -> Exception | None:
        is_first = how == "engine" and not request.resume_token_ids and index == 100
        return ReplicaLostError("the engine failed") if is_first else None

    async with running_cluster(step_s=0.01, error_at=error_at) as cluster:
        first = cluster.replicas[0]
        prompts = [[number] for number in range(20)]
        tasks = [
            asyncio.create_task(gather_chunks(cluster.client, prompt, max_tokens=200, n=n))
            for prompt, n in zip(prompts, [1, 2] * 10, strict=True)
        ]
        await until(lambda: first.loop.num_active == 30)
        await cluster.add_replica(step_s=0.002)
        await cluster.wait_ready(2)
        await asyncio.sleep(0.1)
        if how != "engine":
            await first.stop(0.05 if how == "drained" else 0.0)
        for prompt, task in zip(prompts, tasks, strict=True):
            tokens: dict[int, list[int]] = {}
            for chunk in await task:
                got = tokens.setdefault(chunk.choice_index, [])
                assert chunk.offset == len(got)
                got += chunk.token_ids
            assert tokens == {index: expected(prompt, 200, index) for index in tokens}
        resumed = cluster.replicas[1].loop.submitted
        assert len(resumed) == 30
        assert all(5 <= len(request.resume_token_ids) < 200 for request in resumed)


async def test_only_replica_comes_back() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        first = cluster.replicas[0]
        task = asyncio.create_task(gather_chunks(cluster.client, [3], max_tokens=50))
        await until(lambda: first.loop.num_active == 1)
        await asyncio.sleep(0.1)
        await first.stop()
        await asyncio.sleep(0.3)
        cluster.replicas.clear()
        await cluster.add_replica(port=int(first.address.rsplit(":", 1)[1]))
        assert [t for chunk in await task for t in chunk.token_ids] == expected([3], 50)


async def test_no_replica() -> None:
    async with running_cluster(0, router={"wait_s": 0.3}) as cluster:
        started = time.monotonic()
        with pytest.raises(ReplicaLostError, match="no target replica is ready"):
            await gather_chunks(cluster.client, [1])
        assert 0.25 < time.monotonic() - started < 1
        with pytest.raises(DeadlineExceededError):
            await gather_chunks(cluster.client, [1], timeout_s=0.1)
        # Bad input is told at once all the same.
        with pytest.raises(InvalidRequestError):
            await gather_chunks(cluster.client, [1], max_tokens=-1)
        # A request waits for a replica that is on its way.
        waiting = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=5))
        await asyncio.sleep(0.05)
        await cluster.add_replica()
        assert [t for chunk in await waiting for t in chunk.token_ids] == expected([1], 5)


async def test_what_has_a_deadline_waits_for_a_replica_until_then() -> None:
    async with running_cluster(router={"wait_s": 0.1}, step_s=0.01) as cluster:
        stream = cluster.client.generate([1], max_tokens=50, timeout_s=20.0)
        got = list((await anext(stream)).token_ids)
        rest = asyncio.create_task(collect(stream, got))
        await cluster.replicas[0].stop()
        late = cluster.router.generate(
            generate_call_from_proto(inference_pb2.GenerateRequest(text="a")), timeout_s=0.5
        )
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError, match="deadline passed: no target replica"):
            await anext(late)
        assert 0.4 < time.monotonic() - started < 5
        assert not rest.done()
        await cluster.add_replica()
        await rest
        assert got == expected([1], 50)


async def test_replica_lost_without_another() -> None:
    async with running_cluster(step_s=0.01, router={"wait_s": 0.3}) as cluster:
        stream = cluster.client.generate([1], max_tokens=400)
        await anext(stream)
        await cluster.replicas[0].stop()
        got: list[int] = []
        with pytest.raises(ReplicaLostError):
            await collect(stream, got)


async def test_request_that_breaks_engines_is_given_up() -> None:
    def error_at(request: Request, index: int) -> Exception | None:
        is_poison = request.prompt_token_ids[0] == 2 and index == 5
        return ReplicaLostError("the engine failed") if is_poison else None

    async with running_cluster(2, step_s=0.01, error_at=error_at) as cluster:
        bystander = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=60))
        got: list[int] = []
        with pytest.raises(ReplicaLostError, match="3 replicas in a row"):
            await collect(cluster.client.generate([2], max_tokens=40), got)
        assert got == expected([2], 40)[:5]
        submitted = [request for replica in cluster.replicas for request in replica.loop.submitted]
        assert sum(request.prompt_token_ids[0] == 2 for request in submitted) == 3
        assert [t for chunk in await bystander for t in chunk.token_ids] == expected([1], 60)


async def test_losses_do_not_count_while_tokens_come() -> None:
    def error_at(request: Request, index: int) -> Exception | None:
        is_second = index == len(request.resume_token_ids) + 1
        return ReplicaLostError("the engine failed") if is_second else None

    async with running_cluster(2, error_at=error_at) as cluster:
        chunks = await gather_chunks(cluster.client, [2], max_tokens=8)
        assert [t for chunk in chunks for t in chunk.token_ids] == expected([2], 8)
        assert sum(len(replica.loop.submitted) for replica in cluster.replicas) == 8


@pytest.mark.parametrize("comes_back", [True, False])
async def test_lost_stream_goes_on_with_the_same_target(comes_back: bool) -> None:
    ours, other = {"target": "a" * 64}, {"target": "b" * 64}
    async with running_cluster(0, router={"wait_s": 20.0 if comes_back else 0.5}) as cluster:
        first = await cluster.add_replica(digests=ours, step_s=0.02)
        got: list[int] = []
        stream = cluster.client.generate([3], max_tokens=100)
        got += (await anext(stream)).token_ids
        await cluster.add_replica(digests=other)
        await cluster.wait_ready(2)
        await first.stop()
        if comes_back:
            await cluster.add_replica(digests=ours)
            await collect(stream, got)
            assert got == expected([3], 100)
        else:
            reason = r"same target as the lost one \(a{12}\); replica-1 runs b{12}$"
            with pytest.raises(ReplicaLostError, match=reason):
                await collect(stream, got)
            assert got == expected([3], 100)[: len(got)]
        assert not cluster.replicas[1].loop.submitted
        await gather_chunks(cluster.client, [4], max_tokens=3)  # what is new may run on either


async def test_replica_with_another_tokenizer_is_not_used() -> None:
    router = {"wait_s": 0.3, "tokenizer_digest": "a" * 64}
    async with running_cluster(0, router=router) as cluster:
        stranger = await cluster.add_replica(digests={"tokenizer": "b" * 64})
        reason = f"replica-0 has tokenizer {'b' * 12}, the router has {'a' * 12}"
        with pytest.raises(ReplicaLostError, match=reason):
            await gather_chunks(cluster.client, [1])
        (status,) = (await cluster.client.status()).replicas
        assert (status.state, status.reason) == ("mismatched", reason.removeprefix("replica-0 "))
        await cluster.add_replica(digests={"tokenizer": "a" * 64})
        await cluster.add_replica()  # does not tell
        await cluster.wait_ready(2)
        for number in range(10):
            await gather_chunks(cluster.client, [number], max_tokens=3)
        assert not stranger.loop.submitted


@pytest.mark.parametrize(
    ("tokens", "sampling", "reason"),
    [
        ([1, 7], {}, common_pb2.FINISH_REASON_STOP),
        ([1, 8], {"ignore_eos": True}, common_pb2.FINISH_REASON_STOP),
        ([1, 2, 3, 4], {}, common_pb2.FINISH_REASON_LENGTH),
        ([1, 7], {"ignore_eos": True}, None),
        ([1, 7], {"min_tokens": 2}, None),
    ],
)
async def test_lost_when_all_tokens_had_come(
    tokens: list[int], sampling: dict[str, Any], reason: int | None
) -> None:
    pool = ReplicaPool("router", wait_s=60.0)
    request = Request(
        request_id="r",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=4, stop_token_ids=(8,), **sampling),
    )
    choice = Choice(request, TOKENIZER, pool, lambda: None, eos_token_ids=(7,))
    sources = [common_pb2.TOKEN_SOURCE_TARGET] * len(tokens)
    choice.on_delta(replica_pb2.ConnectResponse.Delta(token_ids=tokens, token_sources=sources))
    choice.on_lost()
    assert choice.done == (reason is not None)
    chunk = choice.take()
    assert chunk is not None
    assert list(chunk.token_ids) == tokens
    assert chunk.finish_reason == (reason or common_pb2.FINISH_REASON_UNSPECIFIED)
    choice.cancel("cancelled")


async def test_a_prompt_that_was_only_to_be_computed_is_lost() -> None:
    request = Request(request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=0))
    choice = Choice(request, TOKENIZER, ReplicaPool("router", wait_s=60.0), lambda: None)
    choice.on_lost()
    assert not choice.done  # nothing of it came
    choice.cancel("cancelled")


async def test_retired_replica_finishes_its_streams() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        task = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=50))
        await until(lambda: cluster.replicas[0].loop.num_active == 1)
        cluster.router.set_replicas([])
        status = await cluster.client.status()
        assert [replica.state for replica in status.replicas] == ["draining"]
        assert [t for chunk in await task for t in chunk.token_ids] == expected([1], 50)
        assert not cluster.replicas[0].loop.cancelled
        await until(lambda: not cluster.router._pool.statuses())


async def test_drain_lets_streams_finish() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        task = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=40))
        await until(lambda: cluster.replicas[0].loop.num_active == 1)
        stopping = asyncio.create_task(cluster.router.stop(5.0))
        await asyncio.sleep(0.05)
        async with AsyncClient(cluster.address) as late:
            with pytest.raises(ClusterStateError):
                await late.status(timeout_s=2.0)
        assert [t for chunk in await task for t in chunk.token_ids] == expected([1], 40)
        await stopping


async def test_replica_stops_only_after_its_requests() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        replica = cluster.replicas[0]
        task = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=40))
        await until(lambda: replica.loop.num_active == 1)
        stopping = asyncio.create_task(replica.stop(5.0))
        await asyncio.sleep(0.05)
        status = await cluster.client.status()
        assert [r.state for r in status.replicas] == ["draining"]
        assert [t for chunk in await task for t in chunk.token_ids] == expected([1], 40)
        assert len(replica.loop.submitted) == 1
        await stopping


class FaultyReplica(replica_pb2_grpc.ReplicaServiceServicer):
    """Repeats tokens, then skips some, and behaves when it is asked again."""

    def __init__(self) -> None:
        self.submits: list[replica_pb2.ConnectRequest.Submit] = []
        self.cancelled: list[str] = []

    async def Connect(self, request_iterator: Any, context: aio.ServicerContext) -> None:
        welcome = replica_pb2.ConnectResponse.Welcome(
            protocol_version=PROTOCOL_VERSION, max_model_len=64, vocab_size=VOCAB_SIZE
        )
        await context.write(replica_pb2.ConnectResponse(welcome=welcome))
        async for message in request_iterator:
            if message.HasField("cancel"):
                self.cancelled.append(message.cancel.request_id)
            if not message.HasField("submit"):
                continue
            self.submits.append(message.submit)
            name = message.submit.request_id
            if not message.submit.resume_token_ids:
                await self.send(context, (name, 0, [1, 2, 3]), ("unknown", 0, [9]))
                await self.send(context, (name, 1, [2, 3, 4]))
                await self.send(context, (name, 0, [1, 2]))
                await self.send(context, (name, 6, [7]))
                await self.send(context, (name, 7, [8]))  # of the submission that was given up
                return  # and the stream breaks
            start = len(message.submit.resume_token_ids)
            await self.send(context, (name, start, range(start + 1, 11)), finish_reason=2)

    async def send(self, context: aio.ServicerContext, *deltas: Any, **last: Any) -> None:
        step = replica_pb2.ConnectResponse.StepUpdate()
        for request_id, offset, token_ids in deltas:
            step.deltas.add(request_id=request_id, token_offset=offset, token_ids=token_ids, **last)
        await context.write(replica_pb2.ConnectResponse(step=step))


async def test_nothing_repeated_or_skipped_is_passed_on() -> None:
    faulty = FaultyReplica()
    server = aio.server()
    replica_pb2_grpc.add_ReplicaServiceServicer_to_server(faulty, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with running_cluster(0) as cluster:
        cluster.router.set_replicas([("faulty", f"127.0.0.1:{port}")])
        chunks = await gather_chunks(cluster.client, [1], max_tokens=10)
        assert [t for chunk in chunks for t in chunk.token_ids] == list(range(1, 11))
        first, second = faulty.submits
        assert list(second.resume_token_ids) == [1, 2, 3, 4]
        assert second.request_id != first.request_id
        await server.stop(0)


class GarblingReplica:
    """Sends bytes that are no message: on one stream behind the welcome of a router, or in its
    place; welcomes on the others, and serves none."""

    def __init__(self, *garbled: str) -> None:
        self.garbled = list(garbled)
        self.num_streams = 0

    async def start(self) -> str:
        handler = grpc.stream_stream_rpc_method_handler(self.connect)
        service = grpc.method_handlers_generic_handler(
            "cluster.v1.ReplicaService", {"Connect": handler}
        )
        self.server = aio.server()
        self.server.add_generic_rpc_handlers((service,))
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return f"127.0.0.1:{port}"

    async def connect(self, _messages: Any, context: aio.ServicerContext) -> None:
        self.num_streams += 1
        await context.read()
        how = self.garbled.pop(0) if self.garbled else ""
        welcome = replica_pb2.ConnectResponse.Welcome(
            protocol_version=PROTOCOL_VERSION, max_model_len=64, vocab_size=VOCAB_SIZE
        )
        message = replica_pb2.ConnectResponse(welcome=welcome).SerializeToString()
        await context.write(b"\xff\xff\xff" if how == "welcome" else message)
        if how == "step":
            await context.read()  # a submission
            await context.write(b"\xff\xff\xff")
        await asyncio.sleep(60)


async def test_a_message_that_cannot_be_read_costs_its_stream_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    garbling = GarblingReplica("welcome", "step", "welcome", "welcome")
    async with running_cluster(0) as cluster:
        cluster.router.set_replicas([("garbling", await garbling.start())])
        await until(lambda: cluster.router.is_ready)
        task = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=10))
        await until(lambda: garbling.num_streams == 5)
        await until(lambda: cluster.router._pool.statuses()[0].state == "ready")
        cluster.router.set_replicas([])
        await cluster.add_replica()
        await garbling.server.stop(0)
        assert [t for chunk in await task for t in chunk.token_ids] == expected([1], 10)
        faults = [r for r in caplog.records if "broke its stream" in r.getMessage()]
        assert [record.levelname for record in faults] == ["ERROR"] * 3  # the fourth is the third


class Wire:
    """A TCP connection in between, that can be cut without a word."""

    async def start(self, address: str) -> str:
        self._host, port = address.rsplit(":", 1)
        self._port = int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, far_writer]
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # cut
        finally:
            writer.close()


async def test_cut_wire() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        replica = cluster.replicas[0]
        wire = Wire()
        cluster.router.set_replicas([("replica-0", await wire.start(replica.address))])
        async with asyncio.timeout(60):
            while [r.state for r in (await cluster.client.status()).replicas] != ["ready"]:
                await asyncio.sleep(0.01)
        task = asyncio.create_task(gather_chunks(cluster.client, [3], n=2, max_tokens=50))
        await until(lambda: replica.loop.num_active == 2)
        await asyncio.sleep(0.1)
        wire.cut()
        cut_at = time.monotonic()
        # The replica frees the pages, and the other way to it serves the rest.
        await until(lambda: len(replica.loop.cancelled) == 2)
        assert time.monotonic() - cut_at < 0.2
        cluster.router.set_replicas([("replica-0", replica.address)])
        tokens: dict[int, list[int]] = {0: [], 1: []}
        for chunk in await task:
            assert chunk.offset == len(tokens[chunk.choice_index])
            tokens[chunk.choice_index] += chunk.token_ids
        assert tokens == {index: expected([3], 50, index) for index in (0, 1)}
        assert len(replica.loop.submitted) == 4


async def test_replicas_that_drain_in_turn_lose_no_queued_request() -> None:
    async with running_cluster(5) as cluster:
        for replica in cluster.replicas:
            replica.loop.is_queued = lambda request: True
        task = asyncio.create_task(gather_chunks(cluster.client, [3], max_tokens=5))
        for grace_s in (0.05, 0.0, 0.05, 0.0):
            await until(lambda: any(r.loop.num_active for r in cluster.replicas) or task.done())
            assert not task.done()
            await next(r for r in cluster.replicas if r.loop.num_active).stop(grace_s)
            await until(lambda: not all(r.loop.num_active for r in cluster.replicas if r.stopped))
        for replica in cluster.replicas:
            replica.loop.is_queued = lambda request: False
        assert [t for chunk in await task for t in chunk.token_ids] == expected([3], 5)


@pytest.mark.parametrize("timeout_s", [20.0, None], ids=["deadline", "no deadline"])
async def test_a_queued_request_waits_for_a_place_when_its_replica_is_lost(
    timeout_s: float | None,
) -> None:
    router = {"wait_s": 20.0, "queue_timeout_s": 20.0}
    async with running_cluster(router=router) as cluster:
        first = cluster.replicas[0]
        first.loop.is_queued = lambda request: True
        call = gather_chunks(cluster.client, [3], max_tokens=5, timeout_s=timeout_s)
        task = asyncio.create_task(call)
        await until(lambda: first.loop.num_active == 1)
        full = (await cluster.add_replica(max_num_seqs=0)).loop
        await cluster.wait_ready(2)
        await first.stop()
        await until(lambda: len(full.submitted) >= 2 or task.done())
        assert not task.done()
        full.max_num_seqs = 1
        assert [t for chunk in await task for t in chunk.token_ids] == expected([3], 5)
        # It is not to be refused for its time in that queue, where it has a deadline.
        has_queue_deadline = [request.queue_deadline is not None for request in full.submitted]
        assert has_queue_deadline == [timeout_s is None] * len(full.submitted)


@pytest.mark.parametrize(
    ("timeout_s", "error"), [(1.0, DeadlineExceededError), (None, QueueFullError)]
)
async def test_the_wait_for_a_place_is_bounded(
    timeout_s: float | None, error: type[Exception]
) -> None:
    async with running_cluster(router={"wait_s": 1.0}) as cluster:
        first = cluster.replicas[0]
        first.loop.is_queued = lambda request: True
        started = time.monotonic()
        call = gather_chunks(cluster.client, [3], max_tokens=5, timeout_s=timeout_s)
        task = asyncio.create_task(call)
        await until(lambda: first.loop.num_active == 1)
        await cluster.add_replica(max_num_seqs=0)
        await cluster.wait_ready(2)
        await first.stop()
        with pytest.raises(error):
            await task
        assert 0.9 < time.monotonic() - started < 10


async def test_who_waited_for_a_replica_waits_for_a_place_there_too() -> None:
    async with running_cluster(0) as cluster:
        tasks = [
            asyncio.create_task(gather_chunks(cluster.client, [number], max_tokens=5))
            for number in range(4)
        ]
        await until(lambda: cluster.router.num_active_requests == 4)
        await cluster.add_replica(max_num_seqs=1)
        for number, task in enumerate(tasks):
            assert [t for chunk in await task for t in chunk.token_ids] == expected([number], 5)
