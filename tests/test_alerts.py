"""Every alert fires in a real Prometheus that scrapes routers to which what it is for happens."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc import aio

from cluster.errors import DsparkError, QueueFullError
from cluster.metrics.scrape_server import ScrapeServer
from cluster.request import Request, SamplingParams
from cluster.rpc.client import AsyncClient
from cluster.rpc.router import RouterServer
from cluster.security.authenticator import Authenticator
from cluster.v1 import drafter_pb2_grpc
from tests.engine_tools import make_config
from tests.metrics_tools import Parts, running_parts
from tests.models import save_tiny_drafter, save_tiny_target
from tests.prometheus_tools import running_prometheus
from tests.promql_tools import RULES, alerts
from tests.rpc_tools import MAX_MODEL_LEN, TOKENIZER, VOCAB_SIZE, Cluster, running_cluster
from tests.test_hostile_drafter import BREAKERS, HostileDrafter
from tests.test_security import entry, write_keys

pytestmark = [
    pytest.mark.full,  # the rules look at seconds, in which everything has to happen: run it alone
    pytest.mark.prometheus,
    pytest.mark.timeout(600),
]

GREEDY = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
SLOW = 77  # the prompt of a request that is kept waiting
BROKEN = 13  # of one that makes a replica fail it
# By when each alert has to fire.
PATIENCE_S = 200


def hurried() -> dict[str, Any]:
    """The rules, with seconds for minutes in their windows and a tenth of one while they wait."""
    rules = copy.deepcopy(yaml.safe_load(RULES.read_text()))
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["for"] = f"{100 * int(rule['for'].removesuffix('m'))}ms"
            rule["expr"] = re.sub(r"\[(\d+)m\]", r"[\1s]", rule["expr"])
    return rules  # type: ignore[no-any-return]


async def test_every_alert_fires_when_it_is_provoked(tmp_path: Path) -> None:
    target = save_tiny_target(tmp_path / "target")
    pair = target, save_tiny_drafter(tmp_path / "drafter", target)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        fakes = await enter(fake_cluster())  # the first: it looks for tasks that are left behind
        # Random drafts, taken at their word; and far fewer pages than are wanted.
        plain = {"online_calibration": False}
        poor = await enter(
            running_parts(
                make_config(*pair, num_pages=24, max_num_seqs=16, speculative=plain),
                model_name="poor",
            )
        )
        # No round can be in time.
        hasty = await enter(
            running_parts(
                make_config(*pair, speculative={"draft_timeout_ms": 0.01}), model_name="hasty"
            )
        )
        shaky = await enter(running_parts(make_config(*pair), model_name="shaky"))
        locked = await enter(locked_router(tmp_path))
        routers = [fakes.router, poor.router, hasty.router, shaky.router, locked[0]]
        servers = [
            ScrapeServer(r.metrics.registry, "127.0.0.1", 0, lambda r=r: r.is_ready)
            for r in routers
        ]
        targets = [f"127.0.0.1:{server.port}" for server in servers]
        prometheus = await asyncio.to_thread(
            stack.enter_context, running_prometheus(targets, hurried(), tmp_path)
        )
        # What happens before the first scrape is not seen to have happened.
        async with asyncio.timeout(PATIENCE_S):
            while await asyncio.to_thread(prometheus.num_up) < len(targets):
                await asyncio.sleep(0.2)
        work = [
            asyncio.create_task(job)
            for job in (
                keep_busy(poor.client, 12),
                keep_busy(hasty.client, 2),
                keep_busy(shaky.client, 2),
                shake(shaky),
                trouble(fakes),
                call_without_a_key(locked[1]),
            )
        ]
        missing = set(alerts()) - {"DsparkNoRouter"}
        deadline = time.monotonic() + PATIENCE_S
        while missing:
            assert time.monotonic() < deadline, missing
            for job in work:
                assert not job.done(), job.result()
            missing -= await asyncio.to_thread(prometheus.firing)
            await asyncio.sleep(0.2)
        for job in work:
            job.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        for server in servers:
            await server.close()
        while "DsparkNoRouter" not in await asyncio.to_thread(prometheus.firing):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)


@asynccontextmanager
async def fake_cluster() -> AsyncIterator[Cluster]:
    """Three fake replicas, one with another tokenizer, behind a router with a short queue."""

    def error_at(request: Request, index: int) -> Exception | None:
        return ValueError("a bug") if request.prompt_token_ids == (BROKEN,) else None

    router = {"max_queued_tokens": 2900, "tokenizer_digest": "same"}
    engine = {"step_s": 0.01, "error_at": error_at, "digests": {"tokenizer": "same"}}
    async with running_cluster(2, router=router, **engine) as cluster:
        await cluster.add_replica(digests={"tokenizer": "another"})
        yield cluster


@asynccontextmanager
async def locked_router(folder: Path) -> AsyncIterator[tuple[RouterServer, AsyncClient]]:
    """A router that asks for keys, and has no replica."""
    server = RouterServer(
        tokenizer=TOKENIZER,
        model_name="locked",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        authenticator=Authenticator(write_keys(folder / "keys", entry("a", "dspark_a"))),
    )
    port = await server.start("127.0.0.1")
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        yield server, client
    await server.stop()


async def keep_busy(client: AsyncClient, num_requests: int) -> None:
    """Greedy requests, so many at a time, without an end."""

    async def one(number: int) -> None:
        while True:
            await client.complete([number, 2, 3], sampling=GREEDY)

    await asyncio.gather(*map(one, range(num_requests)))


async def shake(parts: Parts) -> None:
    """Has the replica's only drafter come and go, and an enemy of it after that."""
    ready = parts.drafts.status()[0]
    good = [(ready.drafter_id, ready.address)]
    server = aio.server()
    drafter_pb2_grpc.add_DrafterServiceServicer_to_server(HostileDrafter(BREAKERS["NaN"]), server)
    enemy = [("enemy", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")]
    await server.start()
    try:
        while True:
            for drafters in (*[[], good] * 6, enemy):
                parts.drafts.set_drafters(drafters)
                await asyncio.sleep(0.5)
    finally:
        await server.stop(0)


async def trouble(cluster: Cluster) -> None:
    """Replicas that are lost, fail requests, and keep others waiting until the queue is full."""
    began = time.monotonic()
    for replica in cluster.replicas:
        replica.loop.is_queued = lambda request: (
            request.prompt_token_ids == (SLOW,) and time.monotonic() - began < 6
        )
    slow = [asyncio.create_task(cluster.client.complete([SLOW], max_tokens=100)) for _ in range(20)]
    stream = cluster.client.generate([5], max_tokens=200)
    async with aclosing(stream) as chunks:
        await anext(chunks)
        with pytest.raises(QueueFullError):
            await cluster.client.complete([1, 2], max_tokens=500)
        lost = next(r for r in cluster.replicas if 5 in _prompts(r.loop.submitted))
        await lost.stop()
        async for _ in chunks:
            pass
    await asyncio.gather(*slow)
    while True:
        with pytest.raises(DsparkError):
            await cluster.client.complete([BROKEN])
        hold = [asyncio.create_task(cluster.client.complete([9], max_tokens=400)) for _ in range(6)]
        await asyncio.sleep(0.1)
        with contextlib.suppress(DsparkError):
            await cluster.client.complete([1, 2], max_tokens=500)
        await asyncio.gather(*hold)


def _prompts(requests: list[Request]) -> set[int]:
    return {request.prompt_token_ids[0] for request in requests}


async def call_without_a_key(client: AsyncClient) -> None:
    while True:
        with contextlib.suppress(DsparkError):
            await client.complete([1])
        await asyncio.sleep(0.05)
