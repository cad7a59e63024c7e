"""Broken messages from live drafters to an engine: none may change a token or stop a request."""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

from cluster.bench.fuzz_hostile_drafters import check_client, no_mistakes, supplied_client
from cluster.bench.fuzz_live_counts import LiveCounts
from cluster.bench.fuzz_surfaces import VOCAB_SIZE
from cluster.bench.fuzz_target import fuzz_config, save_tiny_target
from cluster.config import ClusterConfig
from cluster.engine.engine import Engine
from cluster.engine.worker import ShardWorker
from cluster.request import Request, SamplingParams
from cluster.rpc.drafter_client import GrpcDraftClient

_NUM_DRAFTERS = 6
_NUM_REQUESTS = 12
_NUM_TOKENS = 24
# Of a batch of requests: a second on an idle machine.
_HANG_S = 120.0


async def fuzz_engine(counts: LiveCounts, num_messages: int, rng: random.Random) -> None:
    """Drafts for engines that trust drafters' probabilities, and for some that do not."""
    with tempfile.TemporaryDirectory(prefix="dspark-fuzz-") as folder, no_mistakes(counts):
        save_tiny_target(Path(folder), vocab_size=VOCAB_SIZE)
        expected = await asyncio.to_thread(_run, _engine(fuzz_config(folder), None))
        for trusts, until in ((False, num_messages // 2), (True, num_messages)):
            config = fuzz_config(folder, trust_drafter=trusts)
            await _fuzz_engine(counts, config, expected, until, rng)


async def _fuzz_engine(
    counts: LiveCounts,
    config: ClusterConfig,
    expected: dict[str, list[int]],
    num_messages: int,
    rng: random.Random,
) -> None:
    assert config.speculative is not None
    async with supplied_client(
        counts, config.speculative, num_messages, rng, num_drafters=_NUM_DRAFTERS
    ) as (client, _):
        engine = _engine(config, client)
        try:
            while counts.num_messages < num_messages:
                async with asyncio.timeout(_HANG_S):
                    found = await asyncio.to_thread(_run, engine)
                _compare(counts, found, expected)
                check_client(counts, client)
            before = client.stats.num_rounds
            async with asyncio.timeout(_HANG_S):  # they are honest now
                while client.stats.num_rounds < before + 10:
                    _compare(counts, await asyncio.to_thread(_run, engine), expected)
        except TimeoutError:
            counts.fail("a request hangs, or no drafter is used any more")


def _engine(config: ClusterConfig, client: GrpcDraftClient | None) -> Engine:
    worker = ShardWorker(config, 0)
    worker.start("", 0, 0)
    return worker.build_engine(client, seed=1)


def _run(engine: Engine) -> dict[str, list[int]]:
    """The tokens of each request, and ``-1`` behind them where it has failed."""
    found: dict[str, list[int]] = {}
    for request in _requests():
        found[request.request_id] = []
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += output.token_ids
            if output.error is not None:
                found[output.request_id].append(-1)
    engine.check()
    assert engine.load().kv_cache_usage == 0.0
    return found


def _requests() -> list[Request]:
    """Greedy, seeded, and freely sampled ones."""
    samplings = {
        "greedy": SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS),
        "seeded": SamplingParams(temperature=0.9, seed=5, top_k=50, max_tokens=_NUM_TOKENS),
        "free": SamplingParams(temperature=1.0, max_tokens=_NUM_TOKENS),
    }
    return [
        Request(request_id=f"{name}{index}", prompt_token_ids=(index, 9, 7), sampling=sampling)
        for name, sampling in samplings.items()
        for index in range(_NUM_REQUESTS // len(samplings))
    ]


def _compare(
    counts: LiveCounts, found: dict[str, list[int]], expected: dict[str, list[int]]
) -> None:
    counts.outcomes["requests"] += len(found)
    for name, token_ids in found.items():
        if len(token_ids) != _NUM_TOKENS or -1 in token_ids:
            counts.fail(f"request {name} ended with {len(token_ids)} tokens: {token_ids[-3:]}")
        elif not name.startswith("free") and token_ids != expected[name]:
            counts.fail(f"request {name} has other tokens: {token_ids}, not {expected[name]}")
