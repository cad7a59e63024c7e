"""One router with very many clients, each on a connection of its own."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import time
from pathlib import Path

import pytest

from cluster.request import Request
from cluster.rpc.client import AsyncClient, Chunk
from tests.router_process import RouterProcess
from tests.rpc_tools import expected, gather_chunks, running_cluster, until

ACTIVE_TOKENS = 200
QUEUED_TOKENS = 5
ARRIVE_TOGETHER = 50


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("num_active", "num_queued"),
    [(20, 200), pytest.param(200, 2000, marks=pytest.mark.full)],
)
async def test_queued_requests_on_connections_of_their_own(
    num_active: int, num_queued: int
) -> None:
    num_clients = num_active + num_queued
    allow_files(4 * num_clients + 500)
    is_open = False

    def is_queued(request: Request) -> bool:
        return number_of(request.prompt_token_ids) >= num_active and not is_open

    async with (
        running_cluster(1, step_s=0.02, max_num_seqs=2 * num_clients) as cluster,
        RouterProcess(cluster.replicas) as router,
    ):
        loop = cluster.replicas[0].loop
        loop.is_queued = is_queued
        process = Path(f"/proc/{router.pid}")
        before = num_files(process), resident_mb(process)
        clients = [AsyncClient(f"127.0.0.1:{router.port}") for _ in range(num_clients)]
        started = time.monotonic()
        queued: list[asyncio.Task[list[Chunk]]] = []
        for number in range(num_active, num_clients):
            stream = gather_chunks(clients[number], prompt_of(number), max_tokens=QUEUED_TOKENS)
            queued.append(asyncio.create_task(stream))
            # Not all handshakes at once: all of these clients share the router's two cores.
            if len(queued) % ARRIVE_TOGETHER == 0 or len(queued) == num_queued:
                await until(lambda: loop.num_active == len(queued), timeout_s=60)
        connected_s = time.monotonic() - started
        active = [
            asyncio.create_task(timed_chunks(clients[number], prompt_of(number)))
            for number in range(num_active)
        ]
        await until(lambda: loop.num_active == num_clients, timeout_s=300)
        most = num_files(process), resident_mb(process)
        assert most[0] >= before[0] + num_clients
        gaps: list[float] = []
        for number, task in enumerate(active):
            chunks, times = await task
            assert tokens_of(chunks) == expected(prompt_of(number), ACTIVE_TOKENS)
            gaps += [later - sooner for sooner, later in itertools.pairwise(times)]
        assert not any(task.done() for task in queued)
        is_open = True
        for number, task in enumerate(queued, num_active):
            assert tokens_of(await task) == expected(prompt_of(number), QUEUED_TOKENS)
        for client in clients:
            await client.close()
        await until(lambda: num_files(process) <= before[0] + 5, timeout_s=60)
        gaps.sort()
        print(
            f"{num_queued} queued requests on as many connections after {connected_s:.1f} s; "
            f"{num_active} streams beside them: {gaps[len(gaps) // 2] * 1e3:.0f} ms between "
            f"chunks of 20 ms steps, {gaps[int(len(gaps) * 0.99)] * 1e3:.0f} ms at p99; router: "
            f"{before[1]} MB without clients, {most[1]} MB with them"
        )


async def timed_chunks(client: AsyncClient, prompt: list[int]) -> tuple[list[Chunk], list[float]]:
    chunks, times = [], []
    async for chunk in client.generate(prompt, max_tokens=ACTIVE_TOKENS):
        chunks.append(chunk)
        times.append(time.monotonic())
    return chunks, times


def prompt_of(number: int) -> list[int]:
    return [number // 1000, number % 1000]


def number_of(prompt: tuple[int, ...]) -> int:
    return prompt[0] * 1000 + prompt[1]


def tokens_of(chunks: list[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def num_files(process: Path) -> int:
    return len(os.listdir(process / "fd"))


def resident_mb(process: Path) -> int:
    pages = int((process / "statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20


def allow_files(count: int) -> None:
    """For this process and those it starts; skips where the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"{count} open files are needed, {hard} are allowed (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
