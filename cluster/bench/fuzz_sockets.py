"""Broken messages through live sockets, to servers in this process.

Messages are valid ones with fields or bytes changed, sent as they are: whether protobuf, gRPC or we
refuse them is part of what is tested. On a stream a valid greeting, and often valid messages, come
first, so that what is broken comes behind a good beginning.
"""

from __future__ import annotations

import asyncio
import random
import resource
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from cluster.bench.fuzz_live_counts import LiveCounts
from cluster.bench.fuzz_live_drafter import fuzz_drafter_streams
from cluster.bench.fuzz_live_engine import fuzz_engine
from cluster.bench.fuzz_live_proposals import fuzz_proposals
from cluster.bench.fuzz_live_router import fuzz_bodies, fuzz_grpc

_SURFACES: dict[str, Callable[[LiveCounts, int, random.Random], Coroutine[Any, Any, None]]] = {
    "client": fuzz_grpc,
    "http": fuzz_bodies,
    "drafter": fuzz_drafter_streams,
    "proposals": fuzz_proposals,
    "engine": fuzz_engine,
}
LIVE_SURFACES = tuple(_SURFACES)
_WARM_UP_MESSAGES = 500  # before memory is measured: imports, caches, connections
_MAX_MEMORY_GROWTH_MB = 200.0
_MAX_THREADS_LEFT = 4  # gRPC keeps a poller and a few workers


def fuzz_sockets(surface: str, num_messages: int, seed: int) -> dict[str, Any]:
    """Sends that many messages to live servers of one of ``LIVE_SURFACES``.

    Returns:
        The figures of it; ``failures`` names what must not be.
    """
    run = _SURFACES[surface]
    asyncio.run(run(LiveCounts(), min(_WARM_UP_MESSAGES, num_messages), random.Random(seed)))
    counts = LiveCounts()
    num_threads, memory_mb = threading.active_count(), _memory_mb()
    started = time.monotonic()
    asyncio.run(run(counts, num_messages, random.Random(seed)))
    num_left = threading.active_count() - num_threads
    growth_mb = round(_memory_mb() - memory_mb, 1)
    if num_left > _MAX_THREADS_LEFT:
        counts.fail(f"{num_left} threads are left")
    if growth_mb > _MAX_MEMORY_GROWTH_MB:
        counts.fail(f"memory grew by {growth_mb} MB")
    return {
        "surface": surface,
        **counts.figures(),
        "seconds": round(time.monotonic() - started, 1),
        "memory_growth_mb": growth_mb,
    }


def _memory_mb() -> float:
    """The most that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
