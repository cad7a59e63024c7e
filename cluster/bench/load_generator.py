"""Puts a client under load: so many requests at once, or requests when a trace says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing

from cluster.bench.load_clients import LoadClient
from cluster.bench.load_record import LoadResult, RequestRecord
from cluster.errors import DsparkError
from cluster.request import Request, SpeculationStats

# Some servers send the tokens of a round one by one; what comes so close together is one piece.
_SAME_PIECE_S = 5e-4


async def closed_loop(
    client: LoadClient, requests: Iterable[Request], concurrency: int
) -> LoadResult:
    """Keeps ``concurrency`` requests under way until there are no more.

    A failed request is recorded, and its place goes on with the next.
    """
    queue = iter(requests)
    records: list[RequestRecord] = []
    started_s = time.perf_counter()
    full_until_s: float | None = None

    async def work() -> None:
        nonlocal full_until_s
        for request in queue:
            records.append(await record_request(client, request))
        if full_until_s is None:
            full_until_s = time.perf_counter()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return LoadResult(
        records=tuple(records),
        started_s=started_s,
        full_until_s=full_until_s if full_until_s is not None else started_s,
    )


async def open_loop(
    client: LoadClient, requests: Sequence[Request], arrivals_s: Sequence[float]
) -> LoadResult:
    """Sends each request at its time from the start, whatever has become of those before it.

    Args:
        requests, arrivals_s: one for one; times ascend.
    """
    started_s = time.perf_counter()

    async def send(request: Request, arrival_s: float) -> RequestRecord:
        await asyncio.sleep(started_s + arrival_s - time.perf_counter())
        return await record_request(client, request)

    pairs = zip(requests, arrivals_s, strict=True)
    records = await asyncio.gather(*(send(request, arrival_s) for request, arrival_s in pairs))
    ended_s = max((record.times_s[-1] for record in records if record.times_s), default=started_s)
    return LoadResult(records=tuple(records), started_s=started_s, full_until_s=ended_s)


async def record_request(client: LoadClient, request: Request) -> RequestRecord:
    """Runs one request to its end; never raises what is the server's fault."""
    times_s: list[float] = []
    num_tokens: list[int] = []
    stats: SpeculationStats | None = None
    failure: str | None = None
    started_s = time.perf_counter()
    try:
        async with aclosing(client.generate(request)) as pieces:
            async for piece in pieces:
                stats = piece.stats or stats
                if not piece.num_tokens:
                    continue
                now_s = time.perf_counter()
                if times_s and now_s - times_s[-1] < _SAME_PIECE_S:
                    num_tokens[-1] += piece.num_tokens
                else:
                    times_s.append(now_s)
                    num_tokens.append(piece.num_tokens)
    except DsparkError as error:
        failure = str(error)
    return RequestRecord(
        started_s=started_s,
        times_s=tuple(times_s),
        num_tokens=tuple(num_tokens),
        stats=stats,
        error=failure,
    )
