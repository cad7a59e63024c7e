"""Broken messages to a live router, with a replica behind it: over gRPC, and as HTTP bodies."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import uvicorn

from cluster.api.app import create_app
from cluster.bench import fuzz_client, fuzz_http
from cluster.bench.fuzz_live_counts import CALL_TIMEOUT_S, LiveCounts
from cluster.bench.fuzz_mutators import mutate_behind_first
from cluster.bench.fuzz_replica import ImmediateLoop
from cluster.bench.fuzz_router import make_router
from cluster.bench.fuzz_surfaces import ACCEPTED, MAX_MODEL_LEN, VOCAB_SIZE
from cluster.rpc.channels import open_channel
from cluster.rpc.raw_call import call_unary
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer

_BYTES_TOO = 0.3  # of messages have bytes changed behind their fields
_Call = Callable[[], Awaitable[str]]


async def fuzz_grpc(counts: LiveCounts, num_messages: int, rng: random.Random) -> None:
    """Calls of ``InferenceService``."""
    seeds = fuzz_client.valid_calls()
    async with _router(counts) as (_, address), open_channel(address) as channel:

        async def send(data: bytes) -> str:
            name, _ = fuzz_client.METHODS[data[0] % len(fuzz_client.METHODS)]
            method = f"/cluster.v1.InferenceService/{name}"
            return await call_unary(channel, method, data[1:], timeout_s=CALL_TIMEOUT_S)

        def make_call() -> tuple[_Call, bytes]:
            counts.num_messages += 1
            data = fuzz_client.mutate(rng.choice(seeds), rng)
            if rng.random() < _BYTES_TOO:
                data = mutate_behind_first(data, rng)
            return lambda: send(data), data

        for when in ("before", "behind"):
            for seed in seeds:
                if (outcome := await send(seed)) != "OK":
                    counts.fail(f"a valid call {when} the others ended with {outcome}")
            if when == "before":
                await counts.send_all(num_messages, make_call)


async def fuzz_bodies(counts: LiveCounts, num_messages: int, rng: random.Random) -> None:
    """Bodies of every path."""
    async with (
        _router(counts) as (router, _),
        _http_server(router) as url,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(CALL_TIMEOUT_S)) as session,
    ):

        async def send(data: bytes) -> str:
            path = fuzz_http.PATHS[data[0] % len(fuzz_http.PATHS)]
            headers = {"content-type": "application/json"}
            async with session.post(url + path, data=data[1:], headers=headers) as response:
                return fuzz_http.http_outcome(response.status, await response.read())

        def make_call() -> tuple[_Call, bytes]:
            counts.num_messages += 1
            data = fuzz_http.mutate(rng.choice(fuzz_http.SEEDS), rng)
            if rng.random() < _BYTES_TOO:
                data = mutate_behind_first(data, rng)
            return lambda: send(data), data

        for when in ("before", "behind"):
            for seed in fuzz_http.SEEDS:
                if (outcome := await send(seed)) != ACCEPTED:
                    counts.fail(f"{seed!r} {when} the others ended with {outcome}")
            if when == "before":
                await counts.send_all(num_messages, make_call)


@asynccontextmanager
async def _router(counts: LiveCounts) -> AsyncGenerator[tuple[RouterServer, str]]:
    """A router, and its gRPC address, with a replica behind it; at the end nothing may be left."""
    replica = ReplicaServer("r", max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)
    loop = ImmediateLoop(replica.on_outputs)
    router = make_router()
    replica_port = await replica.start(loop, "127.0.0.1")
    address = f"127.0.0.1:{await router.start('127.0.0.1')}"
    router.set_replicas([("r", f"127.0.0.1:{replica_port}")])
    try:
        yield router, address
        await asyncio.sleep(0.2)
        if router.num_active_requests or router.num_queued_tokens or replica.num_active_requests:
            counts.fail("requests are left")
    finally:
        await router.stop()
        await replica.stop()


@asynccontextmanager
async def _http_server(router: RouterServer) -> AsyncGenerator[str]:
    """The router's HTTP API; yields its URL."""
    config = uvicorn.Config(
        create_app(router),
        host="127.0.0.1",
        port=0,
        log_level="critical",
        timeout_keep_alive=600,  # none is closed while the next request is on its way
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving
