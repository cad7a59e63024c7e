"""Cache pages are all that grows with requests: resident memory after 500 and after many more."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.engine.draft_client import DraftClient
from cluster.engine.draft_engine import DraftEngine
from cluster.engine.draft_factory import build_draft_engine
from cluster.engine.loop import EngineLoop
from cluster.request import SamplingParams
from cluster.rpc.client import AsyncClient
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer
from tests.drafter_rpc_tools import connected_drafter
from tests.engine_tools import make_config, make_engine
from tests.models import save_tiny_drafter, save_tiny_target
from tests.rpc_tools import until
from tests.test_text import small_tokenizer

NUM_WARM = 500
NUM_AT_ONCE = 32
VOCAB_SIZE = 96


def resident_mb() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@contextlib.asynccontextmanager
async def running(
    folder: Path, *, speculate: bool
) -> AsyncIterator[tuple[AsyncClient, EngineLoop, DraftEngine | None]]:
    """Client, router, replica and drafter of this process, with gRPC between all of them."""
    target = save_tiny_target(folder / "target")
    drafter = save_tiny_drafter(folder / "drafter", target) if speculate else None
    # No round is late, however busy the machine: without drafts the test would show little.
    patient = {"speculative": {"draft_timeout_ms": 10_000}} if speculate else {}
    config = make_config(target, drafter, num_pages=500, max_num_seqs=16, **patient)
    draft_engine = build_draft_engine(config) if speculate else None
    draft_client: DraftClient | None = None
    async with contextlib.AsyncExitStack() as stack:
        if draft_engine is not None:
            connected = connected_drafter(config, draft_engine, vocab_size=VOCAB_SIZE)
            _, draft_client = await stack.enter_async_context(connected)
        engine = make_engine(config, draft_client)
        replica = ReplicaServer("r", max_model_len=engine.max_model_len, vocab_size=VOCAB_SIZE)
        loop = EngineLoop(engine, replica.on_outputs)
        loop.start()
        router = RouterServer(
            tokenizer=small_tokenizer(), model_name="tiny", vocab_size=VOCAB_SIZE, max_model_len=256
        )
        router.set_replicas([("r", f"127.0.0.1:{await replica.start(loop, '127.0.0.1')}")])
        async with AsyncClient(f"127.0.0.1:{await router.start('127.0.0.1')}") as asker:
            yield asker, loop, draft_engine
        await router.stop()
        await replica.stop()
        await asyncio.to_thread(loop.stop)  # which closes the draft client


def prompts() -> Iterator[list[int]]:
    """Short ones, of which every third begins like the others of its kind."""
    random = np.random.default_rng(7)
    number = 0
    while True:
        number += 1
        own = random.integers(0, VOCAB_SIZE, random.integers(4, 60)).tolist()
        yield [*range(33), *own] if number % 3 == 0 else own


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_requests", [1500, pytest.param(5000, marks=pytest.mark.full)])
@pytest.mark.parametrize("speculate", [False, True], ids=["plain", "speculative"])
async def test_requests_leave_nothing_behind(
    tmp_path: Path, speculate: bool, num_requests: int
) -> None:
    async with running(tmp_path, speculate=speculate) as (client, loop, draft_engine):
        endless = enumerate(prompts())

        async def ask(until_number: int) -> None:
            for number, prompt in endless:
                kind = number % 3
                params = SamplingParams(
                    temperature=0.0 if kind == 0 else 0.8,
                    seed=number if kind == 1 else None,
                    max_tokens=4 + number % 9,
                )
                (completion,) = await client.complete(prompt, sampling=params)
                assert len(completion.token_ids) == params.max_tokens
                if number + NUM_AT_ONCE >= until_number:
                    break

        used: dict[int, float] = {}
        num_objects: dict[int, int] = {}
        for until_number in (NUM_WARM, num_requests):
            await asyncio.gather(*(ask(until_number) for _ in range(NUM_AT_ONCE)))
            await until(lambda: loop.load().kv_cache_usage == 0.0)
            if draft_engine is not None:
                await until(lambda: draft_engine.num_sessions == 0)
            used[until_number] = resident_mb()
            num_objects[until_number] = len(gc.get_objects())
        load = loop.load()
        assert load.prefix_cache.num_evicted_pages > num_requests  # it has been full for long
        assert (load.stats.num_drafts > num_requests / 10) == speculate
        assert used[num_requests] < 1.03 * used[NUM_WARM], used
        # Memory comes and goes by megabytes; objects tell more: none is left behind by a request.
        assert num_objects[num_requests] - num_objects[NUM_WARM] < (num_requests - NUM_WARM) / 2
