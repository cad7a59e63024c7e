"""Client, router and replica over real gRPC on loopback; only the engine is a fake."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from cluster.engine.text import TextStream
from cluster.errors import (
    ClusterStateError,
    DeadlineExceededError,
    DsparkError,
    InvalidRequestError,
    QueueFullError,
    ReplicaLostError,
    RequestCancelledError,
)
from cluster.request import (
    FinishReason,
    Request,
    SamplingParams,
    SpeculationMode,
    SpeculationParams,
    TokenSource,
)
from cluster.rpc.channels import PROTOCOL_VERSION
from cluster.rpc.client import AsyncClient, Chunk, Client
from cluster.rpc.cluster_status import DrafterStatus, ShardStatus
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer
from cluster.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    replica_pb2,
    replica_pb2_grpc,
)
from tests.fakes import FakeEngineLoop, counted_tokens
from tests.test_text import small_tokenizer

VOCAB_SIZE = 1000
MAX_MODEL_LEN = 512
TOKENIZER = small_tokenizer()


@dataclass
class Replica:
    """One fake replica with its server."""

    replica_id: str
    loop: FakeEngineLoop
    server: ReplicaServer
    address: str
    stopped: bool = False

    async def stop(self, grace_s: float = 0.0) -> None:
        if not self.stopped:
            self.stopped = True
            await self.server.stop(grace_s)
            await asyncio.to_thread(self.loop.stop)


@dataclass
class Cluster:
    """Fake replicas, a router, and a client of it."""

    router: RouterServer
    address: str
    client: AsyncClient
    replicas: list[Replica] = field(default_factory=list)

    async def add_replica(self, *, port: int = 0, **engine: Any) -> Replica:
        replica_id = f"replica-{len(self.replicas)}"
        server = ReplicaServer(
            replica_id,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            describe=lambda: (
                [ShardStatus(rank=0, node="here", pid=1)],
                [DrafterStatus(drafter_id="d", address="a:1", state="ready", round_trip_ms=1.5)],
            ),
        )
        loop = FakeEngineLoop(server.on_outputs, **engine)
        loop.start()
        port = await server.start(loop, "127.0.0.1", port)
        replica = Replica(replica_id, loop, server, f"127.0.0.1:{port}")
        self.replicas.append(replica)
        self.router.set_replicas([(r.replica_id, r.address) for r in self.replicas])
        return replica

    async def wait_ready(self, num_ready: int) -> None:
        async with asyncio.timeout(10):
            while True:
                status = await self.client.status()
                if sum(r.state == "ready" for r in status.replicas) == num_ready:
                    return
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running_cluster(
    num_replicas: int = 1, *, router: dict[str, Any] | None = None, **engine: Any
) -> AsyncIterator[Cluster]:
    tasks_before = asyncio.all_tasks()
    server = RouterServer(
        tokenizer=TOKENIZER,
        model_name="fake",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        **(router or {}),
    )
    port = await server.start("127.0.0.1")
    address = f"127.0.0.1:{port}"
    cluster = Cluster(server, address, AsyncClient(address))
    try:
        for _ in range(num_replicas):
            await cluster.add_replica(**engine)
        await cluster.wait_ready(num_replicas)
        yield cluster
        await until(lambda: server.num_active_requests == 0)
        assert server.num_queued_tokens == 0
        for replica in cluster.replicas:
            await until(lambda replica=replica: replica.server.num_active_requests == 0)
    finally:
        await cluster.client.close()
        await server.stop()
        for replica in cluster.replicas:
            await replica.stop()
    await until(lambda: not leaked_tasks(tasks_before))


def leaked_tasks(before: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() - before if task is not asyncio.current_task()}


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


def expected(prompt: list[int], max_tokens: int, choice_index: int = 0) -> list[int]:
    return counted_tokens(
        Request(
            request_id="",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens),
            choice_index=choice_index,
        )
    )


async def gather_chunks(client: AsyncClient, prompt: Any, **arguments: Any) -> list[Chunk]:
    return [chunk async for chunk in client.generate(prompt, **arguments)]


async def collect(stream: AsyncIterator[Chunk], token_ids: list[int]) -> None:
    """Appends the tokens of a stream until it ends or fails."""
    async for chunk in stream:
        token_ids += chunk.token_ids


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


NAN = float("nan")
BAD_INPUT: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "prompt"),
    ([], {}, "prompt"),
    ([1] * MAX_MODEL_LEN, {}, "prompt"),
    ("word " * 5000, {}, "prompt"),
    ([VOCAB_SIZE], {}, "prompt.token_ids"),
    ([-1], {}, "prompt.token_ids"),
    ([2**40], {}, "prompt.token_ids"),
    ("a\ud800", {}, "prompt"),
    ([1], {"temperature": -0.1}, "sampling.temperature"),
    ([1], {"temperature": NAN}, "sampling.temperature"),
    ([1], {"temperature": "hot"}, "sampling.temperature"),
    ([1], {"temprature": 1.0}, "sampling"),
    ([1], {"top_k": -1}, "sampling.top_k"),
    ([1], {"top_k": 2**40}, "sampling.top_k"),
    ([1], {"top_p": 0.0}, "sampling.top_p"),
    ([1], {"top_p": NAN}, "sampling.top_p"),
    ([1], {"min_p": 1.5}, "sampling.min_p"),
    ([1], {"seed": 2**64}, "sampling.seed"),
    ([1], {"max_tokens": 0}, "sampling.max_tokens"),
    ([1], {"max_tokens": -5}, "sampling.max_tokens"),
    ([1], {"min_tokens": 9, "max_tokens": 8}, "sampling.min_tokens"),
    ([1], {"presence_penalty": 3.0}, "sampling.presence_penalty"),
    ([1], {"frequency_penalty": NAN}, "sampling.frequency_penalty"),
    ([1], {"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
    ([1], {"logprobs": 21}, "sampling.logprobs"),
    ([1], {"stop_token_ids": [VOCAB_SIZE]}, "sampling.stop_token_ids"),
    ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "sampling.logit_bias"),
    ([1], {"logit_bias": {1: 101.0}}, "sampling.logit_bias"),
    ([1], {"stop": [""]}, "sampling.stop"),
    ([1], {"stop": ["x"] * 17}, "sampling.stop"),
    ([1], {"n": 0}, "n"),
    ([1], {"n": 17}, "n"),
    ([1], {"n": 2, "resume_token_ids": [1]}, "resume_token_ids"),
    ([1], {"resume_token_ids": [VOCAB_SIZE]}, "resume_token_ids"),
    ([1], {"resume_token_ids": [1, 2], "max_tokens": 2}, "resume_token_ids"),
    ([1], {"attempt": -1}, "attempt"),
    ([1], {"request_id": "x" * 129}, "request_id"),
    (
        [1],
        {"speculation": SpeculationParams(num_speculative_tokens=-1)},
        "speculation.num_speculative_tokens",
    ),
]


async def test_bad_input_names_its_field_and_disturbs_nobody() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        bystander = asyncio.create_task(gather_chunks(cluster.client, [9], max_tokens=60))
        for prompt, arguments, field_name in BAD_INPUT:
            with pytest.raises(InvalidRequestError) as caught:
                await gather_chunks(cluster.client, prompt, **arguments)
            assert caught.value.field == field_name, (prompt, arguments)
        chunks = await bystander
        assert [t for chunk in chunks for t in chunk.token_ids] == expected([9], 60)
        assert len(cluster.replicas[0].loop.submitted) == 1


async def test_bad_input_on_the_wire() -> None:
    requests = [
        (inference_pb2.GenerateRequest(), "prompt"),
        (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()), "prompt"),
        (
            inference_pb2.GenerateRequest(
                text="x",
                speculation=common_pb2.SpeculationParams(mode=99),  # type: ignore[arg-type]
            ),
            "speculation.mode",
        ),
        (
            inference_pb2.GenerateRequest(
                text="x", sampling=common_pb2.SamplingParams(temperature=NAN)
            ),
            "sampling.temperature",
        ),
    ]
    async with running_cluster() as cluster, aio.insecure_channel(cluster.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for request, field_name in requests:
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Generate(request).read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            status = rpc_status.from_call(caught.value)
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert (info.domain, info.reason) == ("dspark-cluster", "INVALID_REQUEST")
            assert info.metadata["field"] == field_name


async def test_engine_error_ends_only_its_request() -> None:
    secret = "the prompt's own words"

    def error_at(request: Request, index: int) -> Exception | None:
        if index < 5 or request.prompt_token_ids[0] == 1:
            return None
        if request.prompt_token_ids[0] == 2:
            return ValueError(secret)
        return DsparkError("out of pages")

    async with running_cluster(error_at=error_at, step_s=0.005) as cluster:
        good = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=40))
        got: list[int] = []
        with pytest.raises(DsparkError, match=r"internal error \(ValueError\)") as caught:
            await collect(cluster.client.generate([2], max_tokens=40), got)
        assert secret not in str(caught.value)
        assert got == expected([2], 40)[:5]
        with pytest.raises(DsparkError, match="out of pages"):
            await gather_chunks(cluster.client, [3], max_tokens=40)
        assert [t for chunk in await good for t in chunk.token_ids] == expected([1], 40)


async def test_engine_queue_full_reaches_the_client() -> None:
    async with running_cluster(max_num_seqs=1, step_s=0.01) as cluster:
        first = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=30))
        await until(lambda: cluster.replicas[0].loop.num_active == 1)
        with pytest.raises(QueueFullError) as caught:
            await gather_chunks(cluster.client, [1])
        assert caught.value.retry_after_s == pytest.approx(0.5)
        await first


async def test_admission_is_bounded() -> None:
    async with running_cluster(router={"max_queued_tokens": 100}, step_s=0.01) as cluster:
        first = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=60))
        await until(lambda: cluster.router.num_queued_tokens == 61)
        started = time.monotonic()
        with pytest.raises(QueueFullError) as caught:
            await gather_chunks(cluster.client, [1], max_tokens=60)
        assert time.monotonic() - started < 0.2
        assert caught.value.retry_after_s > 0
        await gather_chunks(cluster.client, [1], max_tokens=30)
        await first


@pytest.mark.parametrize("leave", ["close", "cancel", "break"])
async def test_cancel_reaches_the_engine(leave: str) -> None:
    async with running_cluster(step_s=0.01) as cluster:
        loop = cluster.replicas[0].loop
        if leave == "cancel":
            task = asyncio.create_task(gather_chunks(cluster.client, [1], n=3, max_tokens=400))
            await until(lambda: loop.num_active == 3)
            task.cancel()
        else:
            async with aclosing(cluster.client.generate([1], n=3, max_tokens=400)) as chunks:
                await anext(chunks)
                await until(lambda: loop.num_active == 3)
                if leave == "close":
                    await chunks.aclose()
        left_at = time.monotonic()
        await until(lambda: len(loop.cancelled) == 3)
        assert max(when for _, _, when in loop.cancelled) - left_at < 0.2
        assert all(isinstance(error, RequestCancelledError) for _, error, _ in loop.cancelled)
        assert loop.num_active == 0


async def test_deadline_reaches_the_engine() -> None:
    async with running_cluster(step_s=0.01) as cluster:
        loop = cluster.replicas[0].loop
        started = time.monotonic()
        got: list[int] = []
        with pytest.raises(DeadlineExceededError):
            await collect(cluster.client.generate([1], max_tokens=400, timeout_s=0.4), got)
        assert 0.35 < time.monotonic() - started < 0.7
        assert len(got) > 5
        await until(lambda: len(loop.cancelled) == 1)
        assert loop.cancelled[0][2] - started < 0.6
        assert isinstance(loop.cancelled[0][1], DeadlineExceededError)


@pytest.mark.parametrize("how", ["killed", "drained", "engine"])
async def test_stream_goes_on_when_its_replica_is_lost(how: str) -> None:
    def error_at(request: Request, index: int) -> Exception | None:
        is_first = how == "engine" and not request.resume_token_ids and index == 10
        return ReplicaLostError("the engine failed") if is_first else None

    async with running_cluster(step_s=0.01, error_at=error_at) as cluster:
        first = cluster.replicas[0]
        prompts = [[number] for number in range(20)]
        tasks = [
            asyncio.create_task(gather_chunks(cluster.client, prompt, max_tokens=60, n=n))
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
            assert tokens == {index: expected(prompt, 60, index) for index in tokens}
        resumed = cluster.replicas[1].loop.submitted
        assert len(resumed) == 30
        assert all(5 <= len(request.resume_token_ids) < 60 for request in resumed)


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
            await gather_chunks(cluster.client, [1], max_tokens=0)
        # A request waits for a replica that is on its way.
        waiting = asyncio.create_task(gather_chunks(cluster.client, [1], max_tokens=5))
        await asyncio.sleep(0.05)
        await cluster.add_replica()
        assert [t for chunk in await waiting for t in chunk.token_ids] == expected([1], 5)


async def test_replica_lost_without_another() -> None:
    async with running_cluster(step_s=0.01, router={"wait_s": 0.3}) as cluster:
        stream = cluster.client.generate([1], max_tokens=400)
        await anext(stream)
        await cluster.replicas[0].stop()
        got: list[int] = []
        with pytest.raises(ReplicaLostError):
            await collect(stream, got)


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


async def test_status() -> None:
    async with running_cluster(2) as cluster:
        await cluster.client.complete([1], max_tokens=30)
        async with asyncio.timeout(5):
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
                    client.complete([4], temperature=NAN)
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
        async with asyncio.timeout(5):
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
