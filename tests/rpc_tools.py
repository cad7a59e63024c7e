"""A router, its client and replicas with fake engines, over real gRPC on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.request import Request, SamplingParams
from cluster.rpc.client import AsyncClient, Chunk
from cluster.rpc.cluster_status import DrafterStatus, ReplicaParts, ShardStatus
from cluster.rpc.credentials import Credentials
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer
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

    async def add_replica(
        self, *, port: int = 0, digests: dict[str, str] | None = None, **engine: Any
    ) -> Replica:
        replica_id = f"replica-{len(self.replicas)}"
        server = ReplicaServer(
            replica_id,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            model_digests=digests,
            describe=lambda: ReplicaParts(
                shards=[ShardStatus(rank=0, node="here", pid=1)],
                drafters=[
                    DrafterStatus(drafter_id="d", address="a:1", state="ready", round_trip_ms=1.5)
                ],
                num_malformed_proposals=7,
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
        async with asyncio.timeout(60):
            while True:
                status = await self.client.status()
                if sum(r.state == "ready" for r in status.replicas) == num_ready:
                    return
                await asyncio.sleep(0.01)


@asynccontextmanager
async def running_cluster(
    num_replicas: int = 1,
    *,
    router: dict[str, Any] | None = None,
    key: str | None = None,
    **engine: Any,
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
    credentials = None if key is None else Credentials(key)
    cluster = Cluster(server, address, AsyncClient(address, credentials=credentials))
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


async def until(condition: Any, timeout_s: float = 20.0) -> None:
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
