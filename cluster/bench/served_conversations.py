"""Conversations served by a real cluster of two replicas, prefixes followed and not."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.bench.arrival_trace import Arrival
from cluster.bench.conversations import Conversation, ConversationShape, make_conversations
from cluster.bench.own_serving import OwnCluster, OwnSettings
from cluster.bench.paired import paired_ratio
from cluster.bench.report import Report
from cluster.request import SamplingParams
from cluster.rpc.client import AsyncClient

_TARGET = "deployments/models/stdlib-7m"
_POLICIES = ("prefix", "random")
_SHAPE = ConversationShape(
    num_conversations=24,
    starts_per_second=4.0,
    num_system_prompts=2,
    system_tokens=32,
    mean_turns=3.0,
    message_tokens=24.0,
    think_s=0.5,
    max_context=900,
    vocab_size=4000,
)
_LENGTHS = [Arrival(0.0, 200, 24), Arrival(0.0, 300, 32), Arrival(0.0, 120, 16)]


@dataclass
class _Served:
    first_token_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


def run(folder: Path, *, runs: int, note: Callable[[str], None]) -> Report:
    """Serves the same conversations in turn, by a cluster started anew for each.

    Args:
        folder: for logs.
        runs: of each policy, with other conversations each.

    Raises:
        DsparkError: a cluster does not start.
    """
    rows: list[dict[str, Any]] = []
    for seed in range(runs):
        conversations = make_conversations(_SHAPE, _LENGTHS, seed)
        for policy in _POLICIES:
            settings = OwnSettings(
                target=_TARGET,
                drafter=None,
                dtype="float32",
                num_threads=1,
                enforce_eager=True,
                kv_cache_memory_mb=64,
                num_replicas=2,
                replica_choice=policy,
            )
            with OwnCluster(settings, folder) as cluster:
                served = asyncio.run(_serve(cluster.address, conversations))
            rows.append(
                {
                    "policy": policy,
                    "run": seed,
                    "requests": len(served.first_token_s),
                    "hit_rate": round(served.num_cached_tokens / served.num_prompt_tokens, 4),
                    "first_token_p50_ms": round(statistics.median(served.first_token_s) * 1e3, 1),
                    "first_token_p99_ms": round(
                        float(np.quantile(served.first_token_s, 0.99)) * 1e3, 1
                    ),
                }
            )
            note(" ".join(f"{name} {value}" for name, value in rows[-1].items()))
    rates = {p: [row["hit_rate"] for row in rows if row["policy"] == p] for p in _POLICIES}
    figures = {
        "hit_rate_ratio": paired_ratio(rates["prefix"], rates["random"])["ratio"],
        "replicas": 2,
        "rows": rows,
    }
    return Report("router_cluster", figures, figures["hit_rate_ratio"] > 1.0)


async def _serve(address: str, conversations: Sequence[Conversation]) -> _Served:
    served = _Served()
    async with AsyncClient(address) as client:
        await client.complete([1, 2, 3], max_tokens=2)  # connections are there
        async with asyncio.TaskGroup() as group:
            for conversation in conversations:
                group.create_task(_converse(client, conversation, served))
    return served


async def _converse(client: AsyncClient, conversation: Conversation, served: _Served) -> None:
    await asyncio.sleep(conversation.start_s)
    context = list(conversation.system)
    for turn in conversation.turns:
        await asyncio.sleep(turn.think_s)
        context += turn.message
        asked_at = time.monotonic()
        first_s: float | None = None
        sampling = SamplingParams(temperature=0.0, max_tokens=len(turn.answer), ignore_eos=True)
        async for chunk in client.generate(list(context), sampling=sampling):
            if first_s is None and chunk.token_ids:
                first_s = time.monotonic() - asked_at
            context += chunk.token_ids
            if chunk.usage is not None:
                served.num_prompt_tokens += chunk.usage.prompt_tokens
                served.num_cached_tokens += chunk.usage.cached_prompt_tokens
        served.first_token_s.append(first_s or 0.0)
