"""A router, a replica and a drafter over real gRPC in this process, and what they export."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ClusterConfig
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.loop import EngineLoop
from cluster.rpc.client import AsyncClient
from cluster.rpc.cluster_status import ReplicaParts
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.drafter_server import DrafterServer
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer
from tests.drafter_rpc_tools import connected_drafter
from tests.engine_tools import make_engine
from tests.rpc_tools import until
from tests.test_text import small_tokenizer


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: bytes | str) -> Samples:
    """A scrape's samples by name and labels; no sample may be there twice."""
    text = text.decode() if isinstance(text, bytes) else text
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, key
            found[key] = sample.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    """The sum of the samples with these labels, among others; there is at least one."""
    values = [v for (n, of), v in found.items() if n == name and set(labels.items()) <= of]
    assert values, f"no {name} with {labels}"
    return sum(values)


@dataclass
class Parts:
    """One of each part, and a client of the router."""

    router: RouterServer
    replica: ReplicaServer
    loop: EngineLoop
    drafts: GrpcDraftClient
    drafter: DrafterServer
    client: AsyncClient

    def scrape(self) -> Samples:
        """What the router exports."""
        return samples(self.router.metrics.text())


@asynccontextmanager
async def running_parts(
    config: ClusterConfig, *, model_name: str = "tiny", **router: Any
) -> AsyncIterator[Parts]:
    """Serves ``config``, a tiny target with its drafter, until left."""
    async with connected_drafter(config, build_draft_engine(config), vocab_size=96) as connected:
        drafter, drafts = connected
        engine = make_engine(config, draft_client=drafts)
        replica = ReplicaServer(
            "replica-0",
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
            describe=lambda: ReplicaParts(
                drafters=drafts.status(), num_malformed_proposals=drafts.stats.num_malformed
            ),
        )
        loop = EngineLoop(engine, replica.on_outputs)
        loop.start()
        port = await replica.start(loop, "127.0.0.1")
        server = RouterServer(
            tokenizer=small_tokenizer(),
            model_name=model_name,
            vocab_size=96,
            max_model_len=256,
            **router,
        )
        router_port = await server.start("127.0.0.1")
        server.set_replicas([("replica-0", f"127.0.0.1:{port}")])
        await until(lambda: server.is_ready)
        try:
            async with AsyncClient(f"127.0.0.1:{router_port}") as client:
                yield Parts(server, replica, loop, drafts, drafter, client)
                await until(lambda: replica.num_active_requests == 0)
                assert loop.failure is None
        finally:
            await server.stop()
            await replica.stop()
            await asyncio.to_thread(loop.stop)
